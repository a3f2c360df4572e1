"""Prefill speed: a prompt read in chunks over our cache, against one plain forward call of transformers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from core.bundle import Bundle
from core.compatibility import ordered
from core.decoding import PREFILL_CHUNK, prefill
from core.errors import FuseboxError
from core.progress import Progress, Stop, silent
from engines.metrics import percentile
from engines.speed.decode import BASELINES, parse_timed_method
from engines.speed.shapes import apply_methods, load_shape
from kernels.build import native
from kernels.gemm import bf16_way
from kernels.packed_linear import PackedLinear

DEFAULT_METHODS = ("native+vattention:bfloat16", "native+int8:bfloat16", "native+int4:bfloat16")


@torch.inference_mode()
def _plain(bundle: Bundle, ids: list[int]) -> None:
    bundle.model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)


def _chunked(bundle: Bundle, ids: list[int]) -> None:
    prefill(bundle, ids, bundle.cache_factory(), Stop())


def _executor(bundle: Bundle) -> str:
    """What computes a prompt."""
    packed = native().library is not None and any(isinstance(module, PackedLinear) for module in bundle.model.modules())
    return f"torch, products in C ({bf16_way()})" if packed else "torch"


def time_prefill(shape: str, methods: Sequence[str] = DEFAULT_METHODS, *, tokens: int = 256, rounds: int = 5, progress: Progress = silent) -> dict[str, Any]:
    """Rows of every method on a prompt of `tokens` tokens; ABBA against transformers in bfloat16.

    Returns:
        "shape", "tokens", "chunk", "rows"; a row's speed-up is the median of its rounds', since the machine's speed drifts between them. A row
        that failed holds "error".
    """
    base = load_shape(shape, "bfloat16")
    ids = torch.randint(10, 8000, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    out: dict[str, Any] = {"shape": shape, "tokens": tokens, "chunk": PREFILL_CHUNK, "rows": []}
    reference = BASELINES[1]
    _plain(base, ids)
    for place, name in enumerate((reference, *methods)):
        progress(place / (len(methods) + 1), name)
        try:
            techniques, _ = ((), "") if name == reference else parse_timed_method(name)
            bundle = base if name == reference else apply_methods(base, ordered(techniques))
            run: Callable[[Bundle, list[int]], None] = _plain if name == reference else _chunked
            run(bundle, ids)
            ours: list[float] = []
            ratios: list[float] = []
            for _ in range(rounds):
                took: dict[bool, list[float]] = {True: [], False: []}
                for mine in (False, True, True, False):
                    began = time.perf_counter()
                    (run if mine else _plain)(bundle if mine else base, ids)
                    took[mine].append(time.perf_counter() - began)
                ours += [tokens / seconds for seconds in took[True]]
                ratios.append(sum(took[False]) / sum(took[True]))
        except FuseboxError as error:
            out["rows"].append({"method": name, "error": str(error)})
            continue
        out["rows"].append({
            "method": name, "executor": _executor(bundle), "prefill_tok_s": statistics.median(ours), "p10": percentile(ours, 0.1), "p90": percentile(ours, 0.9),
            "speedup_vs_baseline": statistics.median(ratios), "speedups": ratios, "runs": len(ours),
        })
    return out
