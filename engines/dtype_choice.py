"""The baseline runs in the faster of fp32 and bf16, found by timing both on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.bundle import Bundle
from core.decoding import decode_one_token, prefill
from core.memory import available_bytes
from core.progress import Stop

WARM_STEPS, STEPS_PER_TURN, TURNS = 3, 6, "ABBA"


@dataclass(frozen=True)
class DtypeChoice:
    """What was chosen and the decode step times it was chosen by, in seconds; None where a dtype was not timed."""

    dtype: str
    step_s: dict[str, float | None]
    reason: str


def _decoder(bundle: Bundle) -> Callable[[], float]:
    """A function that runs one decode step and returns its time in seconds; warmed up."""
    cache: Any = bundle.cache_factory()
    token = 3 % bundle.model.config.get_text_config().vocab_size
    prefill(bundle, [token] * 16, cache, Stop())

    def step() -> float:
        began = time.perf_counter()
        decode_one_token(bundle, token, cache)
        return time.perf_counter() - began

    for _ in range(WARM_STEPS):
        step()
    return step


def faster_dtype(full: Bundle, load_half: Callable[[], Bundle]) -> tuple[Bundle, DtypeChoice]:
    """Time decode steps of an fp32 bundle against the same model loaded in bf16, in ABBA order, and return the faster one.

    The bf16 model is not loaded, and that is said, when memory does not allow it.
    """
    need = sum(p.numel() * 2 for p in full.model.parameters())
    if need * 1.2 > available_bytes():
        return full, DtypeChoice(full.info.dtype, {full.info.dtype: None}, "no memory to load bf16 beside it and compare")
    half = load_half()
    bundles = {"A": full, "B": half}
    steps = {turn: _decoder(bundle) for turn, bundle in bundles.items()}
    taken: dict[str, list[float]] = {"A": [], "B": []}
    for turn in TURNS:
        taken[turn] += [steps[turn]() for _ in range(STEPS_PER_TURN)]
    times = {bundles[turn].info.dtype: statistics.median(values) for turn, values in taken.items()}
    chosen, slower = sorted((full, half), key=lambda b: times[b.info.dtype])
    reason = (
        f"{chosen.info.dtype} decodes a token in {times[chosen.info.dtype] * 1e3:.2f} ms here, {slower.info.dtype} in {times[slower.info.dtype] * 1e3:.2f} ms"
    )
    return chosen, DtypeChoice(chosen.info.dtype, dict(times), reason)
