"""Matrix times vector over packed weights, all input channels or only some: C where it can be compiled, torch as the reference."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels.arguments import check_float32, pointers, sizes
from kernels.build import native
from kernels.packing import PackedWeight, unpack


def gemv_reference(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """W x + bias in float64 over the unpacked weight, rounded to float32. Arguments as in `gemv`."""
    dense = unpack(weight).double()
    inputs = x.double()
    if rows is not None:
        chosen = rows.long()
        dense, inputs = dense[:, chosen], inputs[chosen]
    out = dense @ inputs
    return (out if bias is None else out + bias.double()).float()


def gemv(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, rows: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """W x + bias.

    Args:
        x: [in_features] float32, contiguous.
        weight: from `kernels.packing.pack`.
        bias: [out_features] float32.
        rows: input channels to read, int32, ascending, each at most once; None reads all. The others' weights are not touched.
        out: [out_features] float32 to write to.

    Returns:
        [out_features] float32; from the C library where there is one, else `gemv_reference`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(x, weight, bias, rows, out)
    library = native().library
    if library is None:
        result = gemv_reference(x, weight, bias, rows)
        return result if out is None else out.copy_(result)
    y = torch.empty(weight.out_features) if out is None else out
    count = weight.in_features if rows is None else rows.numel()
    library.fusebox_gemv(ctypes.byref(weight.matrix(bias)), *pointers(y, x, rows), *sizes(count))
    return y


def _check(x: Tensor, weight: PackedWeight, bias: Tensor | None, rows: Tensor | None, out: Tensor | None) -> None:
    """C reads where it is told to; what does not fit is refused here."""
    check_float32(x=x, bias=bias, out=out)
    wanted = {"x": (x, weight.in_features), "bias": (bias, weight.out_features), "out": (out, weight.out_features)}
    for name, (tensor, length) in wanted.items():
        if tensor is not None and tensor.shape != (length,):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be ({length},)")
    if rows is not None:
        if rows.dtype != torch.int32 or rows.ndim != 1 or not rows.is_contiguous():
            raise ValueError(f"rows is {rows.dtype} {tuple(rows.shape)}; it must be int32, one-dimensional and contiguous")
        if rows.numel() and not (int(rows[0]) >= 0 and int(rows[-1]) < weight.in_features and bool((rows[1:] > rows[:-1]).all())):
            raise ValueError(f"rows must ascend within 0 to {weight.in_features - 1}, each at most once")
