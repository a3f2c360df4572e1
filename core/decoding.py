"""The two forward passes of a language model: prefill and one decode step. Generation and scoring both use them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core.bundle import Bundle
from core.phase import reading_prompt
from core.progress import Stop

PREFILL_CHUNK = 512
"""Prompt tokens per forward call."""


class _Stopped(Exception):
    """Leaves a forward call that nobody waits for any more."""


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The cache under the name that the model's forward takes: `cache` from transformers 5.24 on, `past_key_values` before."""
    return {_cache_name(type(model).forward): cache}


@functools.lru_cache(maxsize=64)
def _cache_name(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


@torch.inference_mode()
def prefill(bundle: Bundle, ids: Sequence[int], cache: Any, stop: Stop) -> Tensor | None:
    """Put the prompt into the cache, chunk by chunk.

    Stop is looked at before every decoder block: a chunk of a large model takes seconds. The cache is then as it was before the call.

    Returns:
        The last position's logits [vocab_size], None when stopped.
    """
    logits, restore = None, _restore(cache)
    try:
        with _stopping(bundle.model, stop), reading_prompt(True):
            for start in range(0, len(ids), PREFILL_CHUNK):
                if stop.requested:
                    raise _Stopped
                chunk = torch.tensor([list(ids[start : start + PREFILL_CHUNK])], device=bundle.device)
                logits = bundle.model(input_ids=chunk, **cache_argument(bundle.model, cache), use_cache=True, logits_to_keep=1).logits[0, -1]
    except _Stopped:
        restore()
        return None
    return logits


@contextmanager
def _stopping(model: nn.Module, stop: Stop) -> Iterator[None]:
    """Inside the block the model's decoder blocks raise `_Stopped` once stop is requested. The first list of modules holds them in every family;
    a model without one runs its chunk to the end."""

    def look(*_: Any) -> None:
        if stop.requested:
            raise _Stopped

    blocks = next((module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)), ())
    handles = [block.register_forward_pre_hook(look, prepend=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _restore(cache: Any) -> Callable[[], None]:
    """What puts the cache back to where it is now. Lengths and references do: layers append to what they hold and write nothing over."""
    layers = list(getattr(cache, "layers", ()))
    states = [dict(vars(layer)) for layer in layers]

    def restore() -> None:
        if layers or getattr(cache, "layers", None):
            cache.layers[:] = layers
        for layer, state in zip(layers, states, strict=True):
            vars(layer).clear()
            vars(layer).update(state)

    return restore


@torch.inference_mode()
def decode_one_token(bundle: Bundle, token: int, cache: Any) -> Tensor:
    """One decode step: the logits [vocab_size] after `token`."""
    if bundle.decoder is not None:
        return bundle.decoder([token], cache)[0].clone()
    ids = torch.tensor([[token]], device=bundle.device)
    with reading_prompt(False):
        logits: Tensor = bundle.model(input_ids=ids, **cache_argument(bundle.model, cache), use_cache=True, logits_to_keep=1).logits[0, -1]
    return logits
