"""Matrix product of many tokens with packed weights, for prompts: C where it can be compiled, torch as the reference."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels.arguments import check_float32, pointers, sizes
from kernels.build import native
from kernels.packing import PackedWeight, unpack
from kernels.structures import kind_of

DTYPES = (torch.float32, torch.bfloat16)
"""Of tokens; the result has the same."""

WAYS = ("float32", "avx512-bf16", "amx-bf16")
"""How the C library multiplies bfloat16 tokens, by `fusebox_gemm_way`."""


def gemm_reference(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """X W + bias in float64 over the unpacked weight, rounded to x's dtype. Arguments as in `gemm`."""
    out = x.double() @ unpack(weight).double().T
    return (out if bias is None else out + bias.double()).to(x.dtype)


def gemm(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """X W + bias, summed in float32.

    float32 tokens meet the weights that `unpack` gives. bfloat16 tokens on a CPU with bfloat16 products meet int8 codes, which are exact
    there, and int4 weights rounded to bfloat16; up to 4 tokens meet the exact ones.

    Args:
        x: [tokens, in_features] float32 or bfloat16, contiguous.
        weight: from `kernels.packing.pack`.
        bias: [out_features] float32.

    Returns:
        [tokens, out_features] in x's dtype; from the C library where there is one, else `gemm_reference`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        MemoryError: no room for the tokens as the kernel lays them out.
    """
    _check(x, weight, bias)
    library = native().library
    if library is None:
        return gemm_reference(x, weight, bias)
    y = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype)
    if y.numel() and not library.fusebox_gemm(ctypes.byref(weight.matrix(bias)), *pointers(y, x), *sizes(x.shape[0], kind_of(x.dtype))):
        raise MemoryError(f"no memory to multiply {x.shape[0]} tokens with {weight.in_features} x {weight.out_features} weights")
    return y


def bf16_way() -> str:
    """How bfloat16 tokens are multiplied on this machine: one of WAYS, or "torch" without the library."""
    library = native().library
    return "torch" if library is None else WAYS[library.fusebox_gemm_way()]


def _check(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    """C reads where it is told to; what does not fit is refused here."""
    if x.dtype not in DTYPES or x.ndim != 2 or x.shape[1] != weight.in_features or not x.is_contiguous() or x.device.type != "cpu":
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)} on {x.device}; it must be (tokens, {weight.in_features}) in float32 or bfloat16, contiguous, on the CPU")
    check_float32(bias=bias)
    if bias is not None and bias.shape != (weight.out_features,):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}; it must be ({weight.out_features},)")
