"""The small operations of a decode step, in C with torch beside it as the reference: norms, rotary positions, activations.

All take and return float32 on the CPU. H heads, D channels of a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kernels.arguments import check_float32, pointers, sizes
from kernels.build import native

ACTIVATIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "silu": (0, functional.silu),
    "relu": (1, functional.relu),
    "gelu": (2, functional.gelu),
    "gelu_tanh": (3, lambda x: functional.gelu(x, approximate="tanh")),
}
"""Name -> number in source/elementwise.c, and the function in torch."""


def norm(x: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float, *, centre: bool) -> Tensor:
    """RMSNorm, or LayerNorm when `centre`, over the last axis of `x` [..., n]; gain and shift [n] or None."""
    check_float32(x=x, gain=gain, shift=shift)
    _check_lengths(x.shape[-1], gain=gain, shift=shift)
    library = native().library
    if library is None:
        return norm_reference(x, gain, shift, eps, centre=centre)
    out = torch.empty_like(x)
    library.fusebox_norm(*pointers(out, x, gain, shift), *sizes(x.numel() // x.shape[-1], x.shape[-1]), ctypes.c_float(eps), *sizes(centre))
    return out


def norm_reference(x: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float, *, centre: bool) -> Tensor:
    """`norm` in torch, float64 inside."""
    wide = x.double()
    if centre:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    wide = wide if gain is None else wide * gain
    return (wide if shift is None else wide + shift).float()


def rope(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions, half-split as in transformers.

    Args:
        x: [H, D]. cosine, sine: [R / 2] of the token's position; R <= D channels turn, the others stay.
    """
    check_float32(x=x, cosine=cosine, sine=sine)
    if x.ndim != 2 or cosine.ndim != 1 or cosine.shape != sine.shape or 2 * len(cosine) > x.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)} and turns by {tuple(cosine.shape)} and {tuple(sine.shape)}; they must be [H, D] and twice [R / 2] with R <= D")
    library = native().library
    if library is None:
        return rope_reference(x, cosine, sine)
    out = x.clone()
    library.fusebox_rope(*pointers(out, cosine, sine), *sizes(x.shape[0], x.shape[1], 2 * len(cosine)))
    return out


def rope_reference(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`rope` in torch."""
    half = len(cosine)
    a, b, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine, rest], -1)


def activate(x: Tensor, kind: str, gated: Tensor | None = None) -> Tensor:
    """activation(x), times `gated` where given; [n] each. `kind` is one of ACTIVATIONS."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"the activation is {kind!r}; use one of {', '.join(ACTIVATIONS)}")
    check_float32(x=x, gated=gated)
    _check_lengths(x.numel(), gated=gated)
    number, function = ACTIVATIONS[kind]
    library = native().library
    if library is None:
        return function(x) if gated is None else function(x) * gated
    out = torch.empty_like(x)
    library.fusebox_activate(*pointers(out, x, gated), *sizes(x.numel(), number))
    return out


def _check_lengths(length: int, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() != length:
            raise ValueError(f"{name} has {tensor.numel()} entries; it must have {length}")
