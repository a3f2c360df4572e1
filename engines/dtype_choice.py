"""The baseline runs in the faster of fp32 and bf16, found by timing both on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass, replace

from core.bundle import Bundle
from core.memory import available_bytes
from core.progress import Stop
from engines.generation import decode_one_token, prefill

WARM_STEPS, TIMED_STEPS = 3, 12


@dataclass(frozen=True)
class DtypeChoice:
    """What was chosen and the decode step times it was chosen by, in seconds; None where a dtype was not timed."""

    dtype: str
    step_s: dict[str, float | None]
    reason: str


def _step_time(bundle: Bundle) -> float:
    cache = bundle.cache_factory()
    token = 3 % bundle.model.config.get_text_config().vocab_size
    prefill(bundle, [token] * 16, cache, Stop())
    times = []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        began = time.perf_counter()
        decode_one_token(bundle, token, cache)
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_STEPS:])


def faster_dtype(bundle: Bundle) -> tuple[Bundle, DtypeChoice]:
    """Time decode steps of an fp32 bundle against its bf16 copy and return the faster one.

    The bf16 copy is skipped, and that is said, when memory does not allow it.
    """
    need = sum(p.numel() * 2 for p in bundle.model.parameters())
    if need * 1.2 > available_bytes():
        return bundle, DtypeChoice(bundle.info.dtype, {bundle.info.dtype: None}, "no memory for a bf16 copy to compare with")
    half = Bundle(copy.deepcopy(bundle.model).bfloat16(), bundle.tokenizer, replace(bundle.info, dtype="bfloat16"))
    times = {b.info.dtype: _step_time(b) for b in (bundle, half)}
    chosen = min((bundle, half), key=lambda b: times[b.info.dtype])
    slower = bundle if chosen is half else half
    reason = f"{chosen.info.dtype} decodes a token in {times[chosen.info.dtype] * 1e3:.2f} ms here, {slower.info.dtype} in {times[slower.info.dtype] * 1e3:.2f} ms"
    return chosen, DtypeChoice(chosen.info.dtype, dict(times), reason)
