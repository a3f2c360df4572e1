"""Units of axes: one for all values of a panel, so that numbers can be compared at a glance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.units import NOT_MEASURED
from engines.compare_view import Spread

_SHORT = {
    "ttft_s": "First token", "tpot_median_s": "Time per token", "tpot_p90_s": "Time per token, p90", "total_s": "Whole answer", "prefill_tok_s": "Prefill speed",
    "decode_tok_s": "Decode speed", "chars_s": "Characters per second", "prompt_tokens": "Prompt tokens", "prompt_tokens_unfiltered": "Prompt before filters",
    "output_tokens": "Answer tokens", "output_chars": "Answer characters", "weights_in_use_bytes": "Weights in use", "weights_kept_for_undo_bytes": "Kept for undo",
    "weights_packed_bytes": "Weights packed", "kv_in_use_bytes": "KV in use", "kv_committed_bytes": "KV committed", "kv_reserved_bytes": "KV reserved",
    "peak_rss_bytes": "Peak memory", "chars_s_per_gib": "Chars/s per GiB", "baseline_answer_bits_per_byte": "Bits per byte", "agreement_share": "Agreement",
    "agreement_tokens": "Tokens agreed", "keyword_recall": "Keyword recall", "rouge_l": "ROUGE-L", "distinct_2": "Distinct bigrams", "repetition_rate": "Repetition",
}


def short_title(metric: str, title: str) -> str:
    """A title that fits a narrow panel; the definition's own for metrics this version has no shorter one for."""
    return _SHORT.get(metric, title)


@dataclass(frozen=True)
class Scale:
    """Values are shown divided by `divisor`, in `unit`."""

    divisor: float
    unit: str

    def text(self, value: float | None) -> str:
        """Three significant digits, bits per byte to thousandths; a dash for what was not measured."""
        if value is None:
            return NOT_MEASURED
        shown = value / self.divisor
        if self.unit == "bits/byte":
            return f"{shown:.3f}"
        if not shown or (self.unit in ("tokens", "characters") and shown == int(shown)):
            return f"{int(shown):,}"
        return f"{shown:,.{max(0, 2 - math.floor(math.log10(abs(shown) * 1.0005)))}f}"


def scale_of(values: Iterable[float], unit: str) -> Scale:
    """The unit in which the largest value reads best: us to s, B to GiB, percent for shares."""
    largest = max((abs(v) for v in values), default=0.0)
    if unit == "s":
        return Scale(1e-3, "ms") if largest < 2 else Scale(1.0, "s")
    if unit == "bytes":
        step = next((n for n in (3, 2, 1) if largest >= 2 ** (10 * n)), 0)
        return Scale(float(2 ** (10 * step)), ("B", "KiB", "MiB", "GiB")[step])
    if unit == "share":
        return Scale(0.01, "%")
    if "/" in unit and largest >= 1e5:
        return Scale(1e3, f"thousand {unit}")
    return Scale(1.0, {"tok": "tokens", "chars": "characters"}.get(unit, unit))


def unit_line(unit: str, better: str | None) -> str:
    """The unit with an arrow to the better side of a horizontal axis, where one is better."""
    return "  ".join(p for p in (unit, {"low": "◂ better", "high": "better ▸"}.get(better or "", "")) if p)


def axis_limit(spreads: Sequence[Spread]) -> float:
    """Where bars end: at the longest line, but not so far beyond the largest median that nothing could be read of the bars."""
    longest, largest = max((s.highest for s in spreads), default=0.0), max((s.median for s in spreads), default=0.0)
    return (min(longest, 4 * largest) if largest > 0 else longest) or 1.0
