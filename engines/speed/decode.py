"""Decode speed of methods on one shape: batch 1, a fixed context, methods in ABBA order against the faster transformers baseline."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from core.bundle import Bundle
from core.compatibility import ordered
from core.errors import FuseboxError
from core.memory import last_level_cache_bytes, peak_resident_bytes, reset_peak, return_freed_memory
from core.progress import Progress, silent
from core.technique import Technique
from engines.methods import parse_method
from engines.metrics import percentile
from engines.speed.bandwidth import read_bandwidth
from engines.speed.peers.names import COUNTERPARTS, load_peer, peer_methods, thread_for
from engines.speed.shapes import EMBEDDED, apply_methods, load_shape, relu_zeros
from engines.speed.sides import Side, cosine, in_turns, prompt

BASELINES = ("transformers:float32", "transformers:bfloat16")
DEFAULT_METHODS = ("native:float32", "native:bfloat16", "native+int8:bfloat16", "native+int4:bfloat16", "native+larosa:bfloat16", "native+int8+larosa:bfloat16", "native+int4+larosa:bfloat16")


def parse_timed_method(text: str) -> tuple[tuple[Technique, ...], str]:
    """`native+int8:bfloat16` -> techniques and dtype; `transformers:float32` has none.

    Raises:
        InvalidRequest: as `parse_method`.
    """
    name, _, dtype = text.rpartition(":")
    if dtype not in ("float32", "bfloat16"):
        name, dtype = text, "bfloat16"
    return (() if name == "transformers" else parse_method(name)), dtype


def counterparts(peer: str, methods: Sequence[str]) -> list[str]:
    """Those of `methods` that a rival is measured against, however they are spelled."""
    against = [parse_timed_method(one) for one in COUNTERPARTS[peer]]
    return [method for method in methods if parse_timed_method(method) in against]


@dataclass
class _Run:
    """What every measurement on a shape shares."""

    shape: str
    context: int
    tokens: int
    rounds: int
    bandwidth: float
    bases: dict[str, Bundle]
    best: str = ""
    """The faster baseline."""

    def side(self, techniques: tuple[Technique, ...], dtype: str) -> Side:
        base = self.bases[dtype]
        return Side.of_bundle(_build(base, self.shape, techniques) if techniques else base, self.context)

    def baseline(self) -> Side:
        return self.side((), self.best.partition(":")[2])


def time_decode(
    shape: str, methods: Sequence[str] = DEFAULT_METHODS, peers: Sequence[str] = (), *, context: int = 256, tokens: int = 16, rounds: int = 2, progress: Progress = silent,
) -> dict[str, Any]:
    """Rows of every method and every rival on a shape.

    Args:
        methods: as `parse_timed_method` reads them; the two baselines come first by themselves.
        peers: as `peer_methods` reads them. Each is also measured in turns with our method that stores about the same bytes.
        tokens: decoded in each segment; each method has 2 * rounds of them.

    Returns:
        "shape", "context", "read_bandwidth" (bytes a second), "cache_resident_below" (bytes), "relu_zeros" (share, None without ReLU), "rows". A row that failed holds "error".
        A row of ours holds "speedup_vs_peer" by rival, a rival's its "settings" and the "logits_cosine" to the faster baseline.

    Raises:
        InvalidRequest: as `parse_timed_method` and `peer_methods`.
    """
    parsed = {m: parse_timed_method(m) for m in methods}
    rivals = peer_methods(peers)
    bandwidth = read_bandwidth()
    out: dict[str, Any] = {"shape": shape, "context": context, "read_bandwidth": bandwidth, "cache_resident_below": last_level_cache_bytes(), "rows": []}
    run = _Run(shape, context, tokens, rounds, bandwidth, {"bfloat16": load_shape(shape, "bfloat16")})
    out["relu_zeros"] = relu_zeros(run.bases["bfloat16"].model, prompt(context))
    parts = len(methods) + len(rivals) + 2
    sides = {}
    for place, name in enumerate(BASELINES):
        progress(place / parts, name)
        dtype = name.partition(":")[2]
        if dtype not in run.bases:
            run.bases[dtype] = _as_dtype(run.bases["bfloat16"], shape, dtype)
        sides[name] = run.side((), dtype)
    for _ in range(rounds):
        for name in (*BASELINES, *reversed(BASELINES)):
            sides[name].run(tokens)
    run.best = min(BASELINES, key=lambda name: statistics.median(sides[name].steps_s))
    best_s = statistics.median(sides[run.best].steps_s)
    for name in BASELINES:
        out["rows"].append(_row(name, sides[name], best_s / statistics.median(sides[name].steps_s), run, None))
    for place, (name, (techniques, dtype)) in enumerate(parsed.items()):
        progress((place + 2) / parts, name)
        out["rows"].append(_time_method(name, partial(run.side, techniques, dtype), run)[0])
    for place, name in enumerate(rivals):
        progress((place + 2 + len(methods)) / parts, name)
        out["rows"].append(_time_peer(name, [row for row in out["rows"] if row["method"] in counterparts(name, methods)], run))
    return out


def _as_dtype(base: Bundle, shape: str, dtype: str) -> Bundle:
    if shape == EMBEDDED:
        return load_shape(shape, dtype)
    return Bundle(copy.deepcopy(base.model).to(getattr(torch, dtype)), base.tokenizer, base.info)


def _time_method(name: str, build: Callable[[], Side], run: _Run) -> tuple[dict[str, Any], Side | None]:
    """A row against the baseline, and the side it was measured on."""
    gc.collect()  # the side before this one holds itself by its hooks
    return_freed_memory()
    counted = reset_peak()
    try:
        side = build()
    except FuseboxError as error:
        return {"shape": run.shape, "method": name, "error": str(error)}, None
    speedup = in_turns(run.baseline(), side, run.tokens, run.rounds)
    return _row(name, side, speedup, run, peak_resident_bytes() if counted else None), side


def _time_peer(name: str, ours: Sequence[dict[str, Any]], run: _Run) -> dict[str, Any]:
    """A rival's row; each of `ours`, rows of methods, gets its speed against the rival, measured in turns with it."""
    room = run.context + 2 * run.tokens + 2
    row, rival = _time_method(name, lambda: Side.of_peer(partial(load_peer, name, run.bases["bfloat16"], room), run.context, thread_for(name)), run)
    if rival is None:
        return row
    row["settings"], row["logits_cosine"] = rival.settings, cosine(rival.logits, run.baseline().logits)
    for one in ours:
        if "error" not in one:
            side = run.side(*parse_timed_method(one["method"]))
            one.setdefault("speedup_vs_peer", {})[name] = in_turns(rival, side, run.tokens, run.rounds)
    return row


def _build(base: Bundle, shape: str, techniques: tuple[Technique, ...]) -> Bundle:
    if shape != EMBEDDED:
        return apply_methods(base, ordered(techniques))
    from engines.engine import fused_engine

    return fused_engine(base, techniques).bundle


def _row(name: str, side: Side, speedup: float, run: _Run, peak: int | None) -> dict[str, Any]:
    speeds = [1 / s for s in side.steps_s]
    median = statistics.median(speeds)
    read = side.bytes_per_token()
    return {
        "method": name, "executor": side.executor, "decode_tok_s": median, "p10": percentile(speeds, 0.1), "p90": percentile(speeds, 0.9),
        "bytes_per_token": read, "bandwidth_fraction": median * read / run.bandwidth if read > last_level_cache_bytes() else None, "cache_resident": read <= last_level_cache_bytes(),
        "speedup_vs_baseline": speedup, "peak_rss_bytes": peak, "steps": len(speeds),
    }
