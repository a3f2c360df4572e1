"""Tensors and numbers as the C library takes them, checked before it sees them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """The addresses of tensors' first entries; None is NULL."""
    return [ctypes.c_void_p(0 if tensor is None else tensor.data_ptr()) for tensor in tensors]


def sizes(*values: int) -> list[ctypes.c_int64]:
    """Whole numbers as int64."""
    return [ctypes.c_int64(int(value)) for value in values]


def check_float32(**tensors: Tensor | None) -> None:
    """Refuse what C would misread.

    Raises:
        ValueError: a tensor is not float32, not contiguous, empty, or not on the CPU; names it.
    """
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu" or not tensor.numel()):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; it must be float32, contiguous, not empty, on the CPU")
