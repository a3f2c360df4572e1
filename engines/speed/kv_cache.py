"""What the reserved KV cache costs and saves, over decode steps of the native runtime: memory, waiting for pages, and a second chat."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from core.bundle import Bundle
from core.compatibility import ordered
from core.decoding import decode_one_token, prefill
from core.memory import proportional_bytes, resident_bytes
from core.progress import Progress, Stop, silent
from core.units import format_bytes
from engines.methods import parse_method
from engines.metrics import percentile
from engines.speed.shapes import apply_methods, load_shape
from kernels.kv_memory.cache import TokenMajorCache, growing_cache
from kernels.kv_memory.region import PAGE_GROUP, reservations_work
from kernels.kv_memory.reservation_pool import ReservationPool
from kernels.kv_memory.shared_prefix import sharing_works

METHOD = "native+vattention"
_SETTLE_S = 0.1
"""For what was asked for in the background."""


def measure_kv(shape: str = "smollm2-135m", *, context: int = 32_768, tokens: int = 1024, prefix: int = 512, rounds: int = 2, progress: Progress = silent) -> dict[str, Any]:
    """Reserve `context` tokens, decode `tokens` of them, and let a second chat begin with `prefix` tokens of a first one.

    Args:
        shape: as `load_shape` names them; its context is set to `context`.
        rounds: of cold, warm, warm, cold.

    Returns:
        "shape" and "rows" with one row, or a row that holds "error".
    """
    if not reservations_work():
        return {"shape": shape, "rows": [{"method": METHOD, "error": "this system does not reserve memory without committing it"}]}
    progress(0.0, f"making {shape}")
    base = load_shape(shape, "bfloat16")
    base.model.config.get_text_config().max_position_embeddings = context
    bundle = apply_methods(base, ordered(parse_method(METHOD)))
    if bundle.decoder is None:
        return {"shape": shape, "rows": [{"method": METHOD, "error": "decode does not run in the native runtime here"}]}
    row: dict[str, Any] = {"method": METHOD, "context": context, "tokens": tokens, "page_group_bytes": PAGE_GROUP, "load_average": os.getloadavg()[0]}
    _decode(bundle, ReservationPool(_pool(bundle).layouts, 16).cache(), 4)  # what is imported and made once is not the reservation's cost
    progress(0.1, "memory of one chat")
    row |= _memory(bundle, tokens)
    progress(0.3, "steps that commit and steps that find their pages")
    row |= _steps(bundle, tokens, rounds)
    progress(0.8, "a second chat with the same beginning")
    row |= _second_chat(bundle, prefix)
    row["summary"] = f"{format_bytes(row['reserved_bytes'])} reserved cost {format_bytes(max(0, row['rss_growth_before_use_bytes']))} before use"
    return {"shape": shape, "rows": [row]}


def _pool(bundle: Bundle) -> ReservationPool:
    pool: ReservationPool = bundle.cache_factory.__self__  # type: ignore[attr-defined]
    return pool


def _cold(bundle: Bundle) -> TokenMajorCache:
    """A cache nobody has used the pages of."""
    return ReservationPool(_pool(bundle).layouts, _pool(bundle).context).cache()


def _decode(bundle: Bundle, cache: TokenMajorCache, tokens: int) -> list[float]:
    """Greedy decode steps from the first position on; seconds of each."""
    token, took = 17, []
    for _ in range(tokens):
        began = time.perf_counter()
        logits = decode_one_token(bundle, token, cache)
        took.append(time.perf_counter() - began)
        token = int(logits.argmax())
    return took


def _memory(bundle: Bundle, tokens: int) -> dict[str, Any]:
    gc.collect()
    before = resident_bytes()
    cache = _cold(bundle)
    reserved = resident_bytes()
    _decode(bundle, cache, tokens)
    time.sleep(_SETTLE_S)
    used, stats = resident_bytes(), cache.stats()
    return {
        "reserved_bytes": stats.reserved_bytes, "rss_growth_before_use_bytes": reserved - before, "rss_growth_after_use_bytes": used - reserved, "committed_bytes": stats.committed_bytes,
        "used_bytes": stats.used_bytes, "waste_bytes": stats.waste_bytes, "copied_bytes": stats.copied_bytes, "regions": sum(len(layer.storage.tensors) for layer in cache.layers),
        "waited_pages": stats.waited_pages, "ahead_pages": stats.ahead_pages, "faults_avoided": stats.faults_avoided,
    }


def _steps(bundle: Bundle, tokens: int, rounds: int) -> dict[str, Any]:
    """Steps over untouched pages and over committed ones, in turns; and over a cache that grows by copying."""
    warm_cache = _cold(bundle)
    _decode(bundle, warm_cache, tokens)
    cold: list[list[float]] = []
    warm: list[list[float]] = []
    with_commits: set[int] = set()
    for side in (cold, warm, warm, cold) * rounds:
        cache = _cold(bundle) if side is cold else warm_cache
        warm_cache.reset()
        side.append(_decode(bundle, cache, tokens))
        if side is cold:
            with_commits = _steps_with_commits(cache, tokens)
    grown = growing_cache(_pool(bundle).layouts)
    growing = _decode(bundle, grown, tokens)
    every_cold, every_warm = [s for run in cold for s in run], [s for run in warm for s in run]
    committing = [run[i] / statistics.median(run[max(0, i - 8) : i + 9]) for run in cold for i in with_commits]
    return {
        "runs": len(cold), "cold_p50_s": statistics.median(every_cold), "cold_p99_s": percentile(every_cold, 0.99), "cold_max_s": max(every_cold),
        "warm_p50_s": statistics.median(every_warm), "warm_p99_s": percentile(every_warm, 0.99), "warm_max_s": max(every_warm),
        "p99_over_p50": _ratios(cold), "warm_p99_over_p50": _ratios(warm),
        "cold_over_warm_p50": statistics.median(statistics.median(c) / statistics.median(w) for c, w in zip(cold, warm, strict=True)),
        "steps_with_commits": len(committing), "step_with_commits_over_neighbours": statistics.median(committing) if committing else None,
        "growing_p50_s": statistics.median(growing), "growing_p99_s": percentile(growing, 0.99), "growing_max_s": max(growing), "growing_copied_bytes": grown.stats().copied_bytes,
    }


def _ratios(runs: Sequence[Sequence[float]]) -> float:
    """Median over runs of p99 / p50 within a run."""
    return statistics.median((percentile(run, 0.99) or 0.0) / statistics.median(run) for run in runs)


def _steps_with_commits(cache: TokenMajorCache, tokens: int) -> set[int]:
    """Steps whose token is the first in some part's page group, so that the next one was asked for and committed meanwhile."""
    sizes = {tensor[0].nbytes for layer in cache.layers for tensor in layer.storage.tensors.values()}
    return {step for step in range(1, tokens) for size in sizes if ((step + 1) * size - 1) // PAGE_GROUP > (step * size - 1) // PAGE_GROUP}


def _second_chat(bundle: Bundle, prefix: int, rest: int = 32, rounds: int = 3) -> dict[str, Any]:
    """The prompt of a second chat, of which a first chat has read `prefix` tokens: read anew, and taken over."""
    if not sharing_works():
        return {"prefix": prefix, "second_chat_error": "this system has no files in memory that can be sealed"}
    ids = torch.randint(10, 8000, (prefix + 2 * rest,), generator=torch.Generator().manual_seed(1)).tolist()
    first, second = ids[: prefix + rest], [*ids[:prefix], *ids[prefix + rest :]]
    out: dict[str, Any] = {"prefix": prefix, "second_prompt_tokens": len(second)}
    times: dict[str, list[float]] = {"anew": [], "shared": []}
    grown: dict[str, list[int]] = {"anew": [], "shared": []}
    for order in (("anew", "shared"), ("shared", "anew")) * rounds:
        logits = {}
        for how in order:
            pool = ReservationPool(_pool(bundle).layouts, _pool(bundle).context)
            _read(bundle, pool, first, reuse=True)
            time.sleep(_SETTLE_S)
            before, began = proportional_bytes(), time.perf_counter()
            cache, logits[how] = _read(bundle, pool, second, reuse=how == "shared")
            times[how].append(time.perf_counter() - began)
            time.sleep(_SETTLE_S)
            grown[how].append(proportional_bytes() - before)
            stats = cache.stats()
            out |= {f"{how}_own_bytes": stats.committed_bytes, f"{how}_shared_bytes": stats.shared_bytes, f"{how}_copied_bytes": stats.copied_bytes, f"{how}_in_file_bytes": pool.shared_bytes()}
            del cache
        spread = float(logits["anew"].float().std())
        out["logits_apart_of_spread"] = max(out.get("logits_apart_of_spread", 0.0), float((logits["anew"].float() - logits["shared"].float()).abs().max()) / spread)
    for how, seconds in times.items():
        out |= {f"{how}_prompt_s": statistics.median(seconds), f"{how}_grown_bytes": int(statistics.median(grown[how]))}
    out["second_prompt_speedup"] = statistics.median(a / s for a, s in zip(times["anew"], times["shared"], strict=True))
    return out


def _read(bundle: Bundle, pool: ReservationPool, ids: Sequence[int], *, reuse: bool) -> tuple[TokenMajorCache, torch.Tensor]:
    """A prompt in a new cache, and the logits after it."""
    cache = pool.cache()
    known = cache.begin(ids, reuse=reuse)
    logits = prefill(bundle, ids[known:], cache, Stop())
    assert logits is not None
    if reuse:
        cache.has_read(ids)
    return cache, logits
