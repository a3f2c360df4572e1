"""Which methods are worth choosing: the Pareto front of speed, memory and quality, and a recommendation under a user's limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import InvalidRequest
from core.units import format_bytes, format_number, format_percent
from engines.compare_view import MethodRow, ModelView, Record, model_view, number
from engines.methods import BASELINE

SAME_SPEED = 0.02  # medians this near each other are a tie: repeats of one method differ by as much
_LOSS = "baseline_answer_bits_per_byte"


@dataclass(frozen=True)
class Point:
    """A method with all that a choice needs; medians over its answers.

    memory_bytes: weights in use + committed KV cache. loss_bits_per_byte: bits per byte of the baseline's answer, less the baseline's own value.
    """

    method: str
    speed_tok_s: float
    memory_bytes: float
    loss_bits_per_byte: float
    agreement: float | None

    def dominates(self, other: Point) -> bool:
        """Not worse in speed, memory and loss, and better in one of them."""
        mine = (-self.speed_tok_s, self.memory_bytes, self.loss_bits_per_byte)
        theirs = (-other.speed_tok_s, other.memory_bytes, other.loss_bits_per_byte)
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class Limits:
    """What a user can accept; None is no limit.

    max_loss_bits_per_byte: over the baseline's own bits per byte of its answer. min_agreement: share of tokens before answers part, 0 to 1.
    """

    max_memory_bytes: float | None = None
    max_loss_bits_per_byte: float | None = None
    min_agreement: float | None = None
    min_speed_tok_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (number(value) is None or value < 0):
                raise InvalidRequest(f"The limit {name} is {value!r}; give a number of 0 or more, or leave it empty.")
        if self.min_agreement is not None and self.min_agreement > 1:
            raise InvalidRequest(f"The limit min_agreement is {self.min_agreement:g}; it is a share between 0 and 1.")


@dataclass(frozen=True)
class Breach:
    """A limit that a method does not keep. `excess` is in units of the limit's own value, so that limits can be compared."""

    kind: str
    words: str
    relaxed: str
    excess: float


@dataclass(frozen=True)
class Recommendation:
    """The method to take, or None, and why. excluded: every method out of the question. alternatives: what else is on the front within the limits."""

    method: str | None
    reasons: tuple[str, ...]
    excluded: Mapping[str, str] = field(default_factory=dict)
    alternatives: Mapping[str, str] = field(default_factory=dict)


def memory_of(row: MethodRow) -> float | None:
    """Weights in use + committed KV cache, in bytes; None unless both were measured."""
    weights, cache = row.metrics.get("weights_in_use_bytes"), row.metrics.get("kv_committed_bytes")
    return weights.median + cache.median if weights and cache else None


def loss_of(view: ModelView, row: MethodRow) -> float | None:
    """Bits per byte of the baseline's answer above the baseline's own; None where either was not measured."""
    base = view.baseline
    if base is None or _LOSS not in base.metrics or _LOSS not in row.metrics:
        return None
    return row.metrics[_LOSS].median - base.metrics[_LOSS].median


def points(view: ModelView) -> tuple[list[Point], dict[str, str]]:
    """Methods that can be compared, in the record's order, and the reason for each that cannot."""
    found, missing = [], {}
    for row in view.rows:
        speed, memory, loss = row.metrics.get("decode_tok_s"), memory_of(row), loss_of(view, row)
        if speed is not None and memory is not None and loss is not None:
            agreed = row.metrics.get("agreement_share")
            found.append(Point(row.method, speed.median, memory, loss, agreed.median if agreed else None))
        elif row.state == "failed":
            missing[row.method] = f"failed: {row.error or 'no reason recorded'}"
        elif row.state in ("waiting", "cancelled"):
            missing[row.method] = "no answer yet" if row.state == "waiting" else "cancelled"
        else:
            absent = [name for name, value in (("speed", speed), ("memory", memory), ("quality loss", loss)) if value is None]
            missing[row.method] = f"{' and '.join(absent)} not measured"
    return found, missing


def front(candidates: Iterable[Point]) -> list[Point]:
    """Those that no other candidate dominates, in their order."""
    candidates = list(candidates)
    return [p for p in candidates if not any(q.dominates(p) for q in candidates)]


def recommend(record: Record, limits: Limits | None = None, model_id: str | None = None) -> Recommendation:
    """The fastest method within the limits; among equally fast ones the one that loses least, then the smallest.

    Args:
        record: a comparison's record.
        model_id: which of its models; the first when not named.
    """
    view = model_view(record, model_id)
    if view is None:
        return Recommendation(None, ("The record has no such model." if model_id else "Nothing has been measured yet.",))
    return _recommend(view, limits or Limits())


def _recommend(view: ModelView, limits: Limits) -> Recommendation:
    found, excluded = points(view)
    if not found:
        return Recommendation(None, (_why_nothing(view),), excluded)
    broken = {p.method: breaches(p, limits) for p in found}
    admitted = [p for p in found if not broken[p.method]]
    excluded |= {m: "; ".join(b.words for b in b_list) for m, b_list in broken.items() if b_list}
    if not admitted:
        return Recommendation(None, tuple(_nearest(broken)), excluded)
    best_ones = front(admitted)
    for point in admitted:
        if point not in best_ones:
            better = next(q for q in best_ones if q.dominates(point))
            excluded[point.method] = f"{better.method} is at least as good in speed, memory and quality, and better in one"
    fastest = max(best_ones, key=lambda p: p.speed_tok_s)
    tied = [p for p in best_ones if p.speed_tok_s >= fastest.speed_tok_s * (1 - SAME_SPEED)]
    chosen = min(tied, key=lambda p: (p.loss_bits_per_byte, p.memory_bytes))
    others = {p.method: _trade(p, chosen) for p in best_ones if p is not chosen}
    return Recommendation(chosen.method, tuple(_reasons(view, chosen, tied, f"{len(admitted)} within your limits, of {len(found)} compared" if limits != Limits() else f"{len(found)} compared")), excluded, others)


def _why_nothing(view: ModelView) -> str:
    if view.baseline is None:
        return f"Quality loss is measured against {BASELINE}, which is not among the methods. Add it and run again."
    return "No method has speed, memory and quality measured yet."


def breaches(point: Point, limits: Limits) -> list[Breach]:
    """The limits that a method does not keep."""
    out = []
    if limits.max_memory_bytes is not None and point.memory_bytes > limits.max_memory_bytes:
        out.append(_breach("memory", point.memory_bytes, limits.max_memory_bytes, format_bytes, "at most"))
    if limits.max_loss_bits_per_byte is not None and point.loss_bits_per_byte > limits.max_loss_bits_per_byte:
        out.append(_breach("quality loss", point.loss_bits_per_byte, limits.max_loss_bits_per_byte, bits, "at most"))
    if limits.min_agreement is not None and point.agreement is None:
        out.append(Breach("agreement", "agreement not measured", "", float("inf")))
    elif limits.min_agreement is not None and point.agreement is not None and point.agreement < limits.min_agreement:
        out.append(_breach("agreement", point.agreement, limits.min_agreement, format_percent, "at least"))
    if limits.min_speed_tok_s is not None and point.speed_tok_s < limits.min_speed_tok_s:
        out.append(_breach("speed", point.speed_tok_s, limits.min_speed_tok_s, speed, "at least"))
    return out


def bits(value: float) -> str:
    """Bits per byte as text; a sign where quality rose."""
    return f"{round(value, 4) + 0.0:.4f} bits/byte"  # no minus before a zero


def speed(value: float) -> str:
    """Tokens a second as text."""
    return f"{format_number(value)} tok/s"


def _breach(name: str, value: float, limit: float, text: Any, side: str) -> Breach:
    gap = abs(value - limit)
    words = f"{name} {text(value)}, limit {side} {text(limit)}, {text(gap)} {'over' if side == 'at most' else 'short'}"
    return Breach(name, words, f"a {name} limit of {side} {text(value)} (by {text(gap)})", gap / limit if limit else float("inf"))


def _nearest(broken: Mapping[str, Sequence[Breach]]) -> list[str]:
    """Nothing fits: which limits bind and what the smallest change would be."""
    counts: dict[str, int] = {}
    for breach in (b for found in broken.values() for b in found):
        counts[breach.kind] = counts.get(breach.kind, 0) + 1
    out = [f"No method keeps every limit. Methods over a limit: {', '.join(f'{k} {n} of {len(broken)}' for k, n in counts.items())}."]
    method, found = min(broken.items(), key=lambda item: (len(item[1]), max(b.excess for b in item[1])))
    out.append(f"Nearest is {method}: {'; '.join(b.words for b in found)}.")
    if all(b.relaxed for b in found):
        out.append(f"It would fit with {' and '.join(b.relaxed for b in found)}.")
    return out


def _reasons(view: ModelView, chosen: Point, tied: Sequence[Point], among: str) -> list[str]:
    row = next(r for r in view.rows if r.method == chosen.method)
    spread = row.metrics["decode_tok_s"]
    width = f" ({format_number(spread.p10)} to {format_number(spread.p90)})" if spread.p10 is not None and spread.p90 is not None else ""
    base = view.baseline.metrics.get("decode_tok_s") if view.baseline and chosen.method != BASELINE else None
    beside = f", {spread.median / base.median:.2f} times the baseline's" if base and base.median else ""
    out = [f"Fastest of the {among}: {speed(spread.median)}{width}{beside}."]
    out.append(f"It takes {format_bytes(chosen.memory_bytes)} of weights and KV cache.")
    agreed = "" if chosen.agreement is None else f"; {format_percent(chosen.agreement)} of its tokens agree before the answers part"
    out.append("It is the baseline, so nothing is lost." if chosen.method == BASELINE else f"It {'gains' if chosen.loss_bits_per_byte <= -0.00005 else 'loses'} {bits(abs(chosen.loss_bits_per_byte))} against the baseline{agreed}.")
    if len(tied) > 1:
        names = ", ".join(f"{p.method} ({speed(p.speed_tok_s)}, {bits(p.loss_bits_per_byte)}, {format_bytes(p.memory_bytes)})" for p in tied if p is not chosen)
        out.append(f"As fast within {SAME_SPEED:.0%}: {names}. Of these it loses least, and where that is equal takes the least memory.")
    return out


def _trade(point: Point, chosen: Point) -> str:
    """What a method on the front gives and takes against the chosen one."""
    parts = [
        ("faster" if point.speed_tok_s > chosen.speed_tok_s else "slower", speed(point.speed_tok_s), point.speed_tok_s - chosen.speed_tok_s),
        ("less memory" if point.memory_bytes < chosen.memory_bytes else "more memory", format_bytes(point.memory_bytes), point.memory_bytes - chosen.memory_bytes),
        ("less loss" if point.loss_bits_per_byte < chosen.loss_bits_per_byte else "more loss", bits(point.loss_bits_per_byte), point.loss_bits_per_byte - chosen.loss_bits_per_byte),
    ]
    return ", ".join(f"{word} ({value})" for word, value, change in parts if change) or "the same in speed, memory and loss"
