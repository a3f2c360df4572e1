"""Which input channels of a vector are worth reading weights for: indices, ascending, for `kernels.gemv`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from kernels.arguments import check_float32, pointers, sizes
from kernels.build import native


def largest(x: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` entries of largest magnitude; of equal ones the first.

    Args:
        x: [n] float32, contiguous.
        keep: 0 to n; more is n.

    Returns:
        [min(keep, n)] int32, ascending.
    """
    _check(x)
    if native().library is None:
        return largest_reference(x, keep)
    return _indices("fusebox_largest", x, ctypes.c_int64(keep))


def largest_reference(x: Tensor, keep: int) -> Tensor:
    """`largest` by a stable sort in torch."""
    order = torch.sort(x.abs(), descending=True, stable=True).indices[: max(0, keep)]
    return order.sort().values.int()


def above(x: Tensor, threshold: float) -> Tensor:
    """Indices of entries of `x` [n] float32 with magnitude above `threshold`, int32, ascending."""
    _check(x)
    if native().library is None:
        return (x.abs() > torch.tensor(threshold)).nonzero()[:, 0].int()
    return _indices("fusebox_above", x, ctypes.c_float(threshold))


def nonzero(x: Tensor) -> Tensor:
    """Indices of entries of `x` [n] float32 that are not exactly zero, int32, ascending."""
    _check(x)
    if native().library is None:
        return x.nonzero()[:, 0].int()
    return _indices("fusebox_nonzero", x)


def _check(x: Tensor) -> None:
    check_float32(x=x)
    if x.ndim != 1:
        raise ValueError(f"x is {tuple(x.shape)}; it must be one-dimensional")


def _indices(symbol: str, x: Tensor, *arguments: Any) -> Tensor:
    rows = torch.empty(x.numel(), dtype=torch.int32)  # the C functions write one entry beyond what they keep
    function = getattr(native().library, symbol)
    function.restype = ctypes.c_int64
    count = function(*pointers(rows, x), *sizes(x.numel()), *arguments)
    return rows[:count]
