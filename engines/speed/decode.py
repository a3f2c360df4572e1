"""Decode speed of methods on one shape: batch 1, a fixed context, methods in ABBA order against the faster transformers baseline."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from core.bundle import Bundle, storage_bytes, tensors_of
from core.compatibility import ordered
from core.decoding import decode_one_token, prefill
from core.errors import FuseboxError
from core.memory import last_level_cache_bytes, peak_resident_bytes, reset_peak
from core.progress import Progress, Stop, silent
from core.technique import Technique
from engines.methods import parse_method
from engines.metrics import percentile
from engines.speed.bandwidth import read_bandwidth
from engines.speed.shapes import EMBEDDED, apply_methods, load_shape

BASELINES = ("transformers:float32", "transformers:bfloat16")
DEFAULT_METHODS = ("native:float32", "native:bfloat16", "native+int8:bfloat16", "native+int4:bfloat16", "native+larosa:bfloat16", "native+int8+larosa:bfloat16", "native+int4+larosa:bfloat16")
_WARM_UP = 2


@dataclass
class _Side:
    """One method with its cache at the stated context."""

    bundle: Bundle
    cache: Any
    steps_s: list[float]

    @classmethod
    def ready(cls, bundle: Bundle, context: int) -> _Side:
        ids = torch.randint(10, 8000, (context,), generator=torch.Generator().manual_seed(1)).tolist()
        cache = bundle.cache_factory()
        prefill(bundle, ids, cache, Stop())
        side = cls(bundle, cache, [])
        side.run(_WARM_UP)
        side.steps_s.clear()
        return side

    def run(self, tokens: int) -> None:
        """Decode some tokens, keep the time of each, and put the cache back."""
        token = 17
        for _ in range(tokens):
            began = time.perf_counter()
            token = int(decode_one_token(self.bundle, token, self.cache).argmax())
            self.steps_s.append(time.perf_counter() - began)
        self.cache.crop(-tokens)


def parse_timed_method(text: str) -> tuple[tuple[Technique, ...], str]:
    """`native+int8:bfloat16` -> techniques and dtype; `transformers:float32` has none.

    Raises:
        InvalidRequest: as `parse_method`.
    """
    name, _, dtype = text.rpartition(":")
    if dtype not in ("float32", "bfloat16"):
        name, dtype = text, "bfloat16"
    return (() if name == "transformers" else parse_method(name)), dtype


def time_decode(
    shape: str, methods: Sequence[str] = DEFAULT_METHODS, *, context: int = 256, tokens: int = 16, rounds: int = 2, progress: Progress = silent,
) -> dict[str, Any]:
    """Rows of every method on a shape.

    Args:
        methods: as `parse_timed_method` reads them; the two baselines come first by themselves.
        tokens: decoded in each segment; each method has 2 * rounds of them.

    Returns:
        "shape", "context", "read_bandwidth" (bytes a second), "cache_resident_below" (bytes), "rows". A row that failed holds "error".
    """
    parsed = {m: parse_timed_method(m) for m in methods}
    bandwidth = read_bandwidth()
    out: dict[str, Any] = {"shape": shape, "context": context, "read_bandwidth": bandwidth, "cache_resident_below": last_level_cache_bytes(), "rows": []}
    bases = {"bfloat16": load_shape(shape, "bfloat16")}
    sides = {}
    for place, name in enumerate(BASELINES):
        progress(place / (len(methods) + 2), name)
        dtype = name.partition(":")[2]
        if dtype not in bases:
            bases[dtype] = _as_dtype(bases["bfloat16"], shape, dtype)
        sides[name] = _Side.ready(bases[dtype], context)
    for _ in range(rounds):
        for name in (*BASELINES, *reversed(BASELINES)):
            sides[name].run(tokens)
    best = min(BASELINES, key=lambda name: statistics.median(sides[name].steps_s))
    for name in BASELINES:
        out["rows"].append(_row(name, sides[name], sides[best].steps_s, bandwidth, context, None))
    for place, (name, (techniques, dtype)) in enumerate(parsed.items()):
        progress((place + 2) / (len(methods) + 2), name)
        out["rows"].append(_time_method(name, techniques, bases[dtype], shape, sides[best].bundle, context, tokens, rounds, bandwidth))
    return out


def _as_dtype(base: Bundle, shape: str, dtype: str) -> Bundle:
    if shape == EMBEDDED:
        return load_shape(shape, dtype)
    return Bundle(copy.deepcopy(base.model).to(getattr(torch, dtype)), base.tokenizer, base.info)


def _time_method(name: str, techniques: tuple[Technique, ...], base: Bundle, shape: str, baseline: Bundle, context: int, tokens: int, rounds: int, bandwidth: float) -> dict[str, Any]:
    counted = reset_peak()
    try:
        side = _Side.ready(_build(base, shape, techniques), context)
    except FuseboxError as error:
        return {"shape": shape, "method": name, "error": str(error)}
    reference = _Side.ready(baseline, context)
    for _ in range(rounds):
        for one in (reference, side, side, reference):
            one.run(tokens if one is reference else 2 * tokens)
    return _row(name, side, reference.steps_s, bandwidth, context, peak_resident_bytes() if counted else None)


def _build(base: Bundle, shape: str, techniques: tuple[Technique, ...]) -> Bundle:
    if shape != EMBEDDED:
        return apply_methods(base, ordered(techniques))
    from engines.engine import fused_engine

    return fused_engine(base, techniques).bundle


def _row(name: str, side: _Side, reference_s: list[float], bandwidth: float, context: int, peak: int | None) -> dict[str, Any]:
    speeds = [1 / s for s in side.steps_s]
    median = statistics.median(speeds)
    native = side.bundle.decoder
    read = bytes_per_token(side.bundle, context)
    return {
        "method": name, "executor": "native" if native is not None else "torch", "decode_tok_s": median, "p10": percentile(speeds, 0.1), "p90": percentile(speeds, 0.9),
        "bytes_per_token": read, "bandwidth_fraction": median * read / bandwidth if read > last_level_cache_bytes() else None, "cache_resident": read <= last_level_cache_bytes(),
        "speedup_vs_baseline": median * statistics.median(reference_s), "peak_rss_bytes": peak, "steps": len(speeds),
    }


def bytes_per_token(bundle: Bundle, context: int) -> int:
    """Weights and cache entries that one step reads."""
    config: Any = bundle.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * heads * dim * context * next(bundle.model.parameters()).element_size()
    decoder: Any = bundle.decoder
    if decoder is not None:
        return int(decoder.compiled.program.weight_bytes_per_step(decoder.steps)) + kv
    everything = storage_bytes(tensors_of([bundle.model]))
    table: Any = bundle.model.get_input_embeddings()
    head: Any = bundle.model.get_output_embeddings()
    tied = table.weight.data_ptr() == head.weight.data_ptr()
    return sum(everything.values()) - (0 if tied else int(table.weight.nbytes)) + kv
