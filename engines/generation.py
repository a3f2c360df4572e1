"""The one generation loop: prefill, then decode, as events whose times are taken here, in the engine's thread."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from core.bundle import Bundle
from core.decoding import decode_one_token, prefill
from core.progress import Stop
from engines.sampling import Sampler, Sampling
from kernels.kv_memory.cache import KVStats, TokenMajorCache


@dataclass(frozen=True)
class Prefilled:
    """The prompt is in the KV cache. Times are `time.perf_counter()` values.

    reused_tokens: of the prompt, that an earlier one began with and that were not computed again; None: the cache keeps no earlier texts.
    """

    prompt_tokens: int
    began_s: float
    ended_s: float
    reused_tokens: int | None = None


@dataclass(frozen=True)
class TokenDecoded:
    """One token was chosen at `at_s`."""

    token: int
    at_s: float


@dataclass(frozen=True)
class Finished:
    """The answer ended: `reason` is eos, length or stopped."""

    reason: str
    kv_in_use_bytes: int | None
    kv_reserved_bytes: int | None
    kv_committed_bytes: int | None = None
    reservation: KVStats | None = None
    """All figures of a reserved cache; None for other caches."""


GenerationEvent = Prefilled | TokenDecoded | Finished


def end_tokens(bundle: Bundle) -> frozenset[int]:
    """Token ids that end an answer."""
    given = bundle.model.generation_config.eos_token_id
    ids = set(given if isinstance(given, (list, tuple)) else [given]) | {bundle.tokenizer.eos_token_id}
    return frozenset(int(i) for i in ids if i is not None)


def generate(bundle: Bundle, prompt_ids: Sequence[int], sampling: Sampling, stop: Stop, *, reuse: bool = False) -> Iterator[GenerationEvent]:
    """Answer a prompt. The end token, where there is one, is not among the events.

    reuse: take over what an earlier prompt with the same beginning left in the KV memory, where the cache keeps that; its tokens' entries are
    those that reading the prompt anew would compute, but for rounding. Tokens that were decoded are read again: techniques may treat the two apart.
    """
    cache = bundle.cache_factory()
    keeps = isinstance(cache, TokenMajorCache) and cache.texts is not None
    sampler = Sampler(sampling, prompt_ids, bundle.device)
    ends = frozenset() if sampling.ignore_eos else end_tokens(bundle)
    began = time.perf_counter()
    reused = cache.begin(prompt_ids, reuse=reuse) if keeps else None
    logits = prefill(bundle, prompt_ids[reused or 0 :], cache, stop)
    reason = "length"
    if logits is None:
        yield _finished("stopped", cache)
        return
    yield Prefilled(len(prompt_ids), began, time.perf_counter(), reused)
    if reuse and keeps:
        cache.has_read(prompt_ids)
    for index in range(sampling.max_new_tokens):
        token = sampler.next_token(logits)
        if token in ends:
            reason = "eos"
            break
        yield TokenDecoded(token, time.perf_counter())
        if stop.requested:
            reason = "stopped"
            break
        if index + 1 < sampling.max_new_tokens:
            logits = decode_one_token(bundle, token, cache)
    yield _finished(reason, cache)


def _finished(reason: str, cache: Any) -> Finished:
    if isinstance(cache, TokenMajorCache):
        stats = cache.stats()
        return Finished(reason, stats.used_bytes, stats.reserved_bytes, stats.committed_bytes, stats if cache.texts is not None else None)
    tensors = [t for layer in getattr(cache, "layers", ()) for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor)]
    if not tensors:
        return Finished(reason, None, None)
    reserved = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return Finished(reason, sum(t.numel() * t.element_size() for t in tensors), sum(reserved.values()), sum(reserved.values()))
