"""Large tensors in 2 MB pages: a step reads every weight once, and small pages cost it a tenth to a quarter of the bandwidth."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE = 2 * 2**20
_LEAST = 2 * HUGE
"""Smaller tensors stay where they are."""


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of a large tensor in memory that asks the kernel for huge pages; `tensor` itself where it is small or the system has none."""
    copy = _empty(tensor.shape, tensor.dtype)
    return tensor if copy is None else copy.copy_(tensor)


def empty_in_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.empty`; where the tensor is large, in memory that asks the kernel for huge pages."""
    made = _empty(shape, dtype)
    return torch.empty(tuple(shape), dtype=dtype) if made is None else made


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    size = math.prod(shape) * dtype.itemsize
    if sys.platform != "linux" or size < _LEAST:
        return None
    memory = mmap.mmap(-1, (size // HUGE + 2) * HUGE)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):
        return None
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping alive
    start = -whole.data_ptr() % HUGE
    return whole[start : start + size].view(dtype).view(tuple(shape))
