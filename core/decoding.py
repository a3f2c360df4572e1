"""The two forward passes of a language model: prefill and one decode step. Generation and scoring both use them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.bundle import Bundle
from core.phase import reading_prompt
from core.progress import Stop

PREFILL_CHUNK = 512
"""Prompt tokens per forward call; Stop is looked at between two of them."""


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The cache under the name that the model's forward takes: `cache` from transformers 5.24 on, `past_key_values` before."""
    return {_cache_name(type(model).forward): cache}


@functools.lru_cache(maxsize=64)
def _cache_name(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


@torch.inference_mode()
def prefill(bundle: Bundle, ids: Sequence[int], cache: Any, stop: Stop) -> Tensor | None:
    """Put the prompt into the cache, chunk by chunk; the last position's logits [vocab_size], None when stopped."""
    logits = None
    for start in range(0, len(ids), PREFILL_CHUNK):
        if stop.requested:
            return None
        chunk = torch.tensor([list(ids[start : start + PREFILL_CHUNK])], device=bundle.device)
        with reading_prompt(True):
            logits = bundle.model(input_ids=chunk, **cache_argument(bundle.model, cache), use_cache=True, logits_to_keep=1).logits[0, -1]
    return logits


@torch.inference_mode()
def decode_one_token(bundle: Bundle, token: int, cache: Any) -> Tensor:
    """One decode step: the logits [vocab_size] after `token`."""
    if bundle.decoder is not None:
        return bundle.decoder([token], cache)[0].clone()
    ids = torch.tensor([[token]], device=bundle.device)
    with reading_prompt(False):
        logits: Tensor = bundle.model(input_ids=ids, **cache_argument(bundle.model, cache), use_cache=True, logits_to_keep=1).logits[0, -1]
    return logits
