"""What the reserved KV cache costs: memory before and after use, waiting for pages, and the steps' tail."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import psutil
import torch

from core.units import format_bytes
from engines.metrics import percentile
from kernels.kv_memory.cache import TokenMajorCache, growing_cache
from kernels.kv_memory.layout import KVLayout
from kernels.kv_memory.region import PAGE_GROUP, reservations_work
from kernels.kv_memory.reservation_pool import ReservationPool


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def _fill(cache: TokenMajorCache, layout: KVLayout, tokens: int, pause_s: float) -> list[float]:
    """Write tokens one by one into every layer, as decode does; seconds each, without the pause that stands for the model's work."""
    keys = torch.ones(1, layout.k_heads, 1, layout.head_dim, dtype=layout.dtype)
    values = torch.ones(1, layout.v_heads, 1, layout.v_head_dim or layout.head_dim, dtype=layout.dtype)
    took = []
    for _ in range(tokens):
        time.sleep(pause_s)
        began = time.perf_counter()
        for layer in cache.layers:
            layer.update(keys, values)
        took.append(time.perf_counter() - began)
    return took


def measure_kv(*, layers: int = 22, heads: int = 4, head_dim: int = 64, context: int = 32_768, tokens: int = 1024, pause_s: float = 0.002) -> dict[str, Any]:
    """Reserve `context` tokens, use `tokens` of them, and compare with a cache that grows by copying. TinyLlama's layout by default.

    pause_s: stands for the rest of a decode step, during which pages are committed in the background.
    """
    layout = KVLayout(heads, heads, head_dim, torch.bfloat16)
    layouts = (layout,) * layers
    if not reservations_work():
        return {"error": "this system does not reserve memory without committing it"}
    _fill(ReservationPool(layouts, 16).cache(), layout, 1, 0.0)  # what is imported and made once is not the reservation's cost
    gc.collect()
    before = resident_bytes()
    pool = ReservationPool(layouts, context)
    cache = pool.cache()
    reserved = resident_bytes()
    took = _fill(cache, layout, tokens, pause_s)
    time.sleep(0.1)
    used = resident_bytes()
    stats = cache.stats()
    regions = [region for layer in cache.layers for region in layer.storage.regions.values()]  # type: ignore[attr-defined]
    growing = growing_cache(layouts)
    grew = _fill(growing, layout, tokens, pause_s)
    return {
        "layers": layers, "heads": heads, "head_dim": head_dim, "context": context, "tokens": tokens, "reserved_bytes": stats.reserved_bytes,
        "rss_growth_before_use_bytes": reserved - before, "rss_growth_after_use_bytes": used - reserved, "committed_bytes": stats.committed_bytes,
        "used_bytes": stats.used_bytes, "waste_bytes": stats.waste_bytes, "regions": len(regions), "page_group_bytes": PAGE_GROUP, "waited_pages": stats.waited_pages,
        "write_p50_s": statistics.median(took), "write_p99_s": percentile(took, 0.99), "write_max_s": max(took),
        "growing_copied_bytes": growing.stats().copied_bytes, "growing_p99_s": percentile(grew, 0.99), "growing_max_s": max(grew), "growing_committed_bytes": growing.stats().committed_bytes,
        "summary": f"{format_bytes(stats.reserved_bytes)} reserved cost {format_bytes(max(0, reserved - before))} before use",
    }
