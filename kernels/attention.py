"""Attention of one token over cached ones, in C with torch beside it as the reference.

S cached tokens, H query heads, D channels of a head.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels.arguments import check_float32, pointers, sizes
from kernels.build import native
from kernels.structures import GROUP, Cached, address, kind_of


def attention(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, *, length: int | None = None, window: int | None = None,
    key_scales: Tensor | None = None, value_scales: Tensor | None = None,
) -> Tensor:
    """Attention of one token over cached ones.

    Args:
        q: [H, D] float32.
        keys: [S, key_heads, D], values: [S, value_heads, D_v], token-major, both float32, bfloat16 or int8; head counts divide H, and may differ.
        length: tokens in the cache; all S when None.
        window: only the last so many tokens are seen.
        key_scales, value_scales: [S, heads] float32, for int8: entry = code * scale.

    Returns:
        [H, D_v] float32.
    """
    check_float32(q=q, key_scales=key_scales, value_scales=value_scales)
    count = keys.shape[0] if length is None else length
    heads = q.shape[0]
    fits = q.ndim == 2 and keys.ndim == values.ndim == 3 and keys.shape[2] == q.shape[1] and not heads % keys.shape[1] and not heads % values.shape[1]
    whole = keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype
    if not fits or not whole or not 1 <= count <= min(keys.shape[0], values.shape[0]):
        raise ValueError(f"q {tuple(q.shape)}, keys {tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} {values.dtype} do not fit over {count} tokens")
    scaled = key_scales is not None and value_scales is not None and key_scales.shape == keys.shape[:2] and value_scales.shape == values.shape[:2]
    if (keys.dtype == torch.int8) != scaled:
        raise ValueError(f"keys are {keys.dtype}; int8 needs key_scales and value_scales of [S, heads], and only int8")
    first = 0 if window is None else max(0, count - window)
    library = native().library
    if library is None:
        k, v = (t[first:count].float() * (1 if s is None else s[first:count, :, None]) for t, s in ((keys, key_scales), (values, value_scales)))
        return attention_reference(q, k, v, scale)
    cached = Cached(kind_of(keys.dtype), keys.shape[1], values.shape[1], q.shape[1], values.shape[2], *map(address, (keys, values, key_scales, value_scales)))
    out, scores = torch.empty(heads, values.shape[2]), torch.empty(torch.get_num_threads() * GROUP * count)
    library.fusebox_attention(*pointers(out, q), ctypes.byref(cached), *sizes(heads, first, count), ctypes.c_float(scale), *pointers(scores))
    return out


def attention_reference(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """`attention` in torch, float64 inside, over all tokens given."""
    heads = q.shape[0]
    k = keys.double().repeat_interleave(heads // keys.shape[1], 1)
    v = values.double().repeat_interleave(heads // values.shape[1], 1)
    shares = (scale * torch.einsum("hd,shd->hs", q.double(), k)).softmax(-1)
    return torch.einsum("hs,shd->hd", shares, v).float()
