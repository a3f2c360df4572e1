"""The structures that the C library takes, as in source/fusebox.h and source/step.c."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

_I, _F, _P = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
KIND_NUMBERS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8, "int4": INT4}
MOST_TOKENS = 4
"""Tokens that one step takes at most."""
GROUP = 4
"""Query heads that go through the cache together: scores need room for so many."""


class Matrix(ctypes.Structure):
    """A packed weight matrix."""

    _fields_ = [("kind", _I), ("in_", _I), ("out", _I), ("group", _I), ("row_tiles", _I), ("data", _P), ("scale", _P), ("bias", _P)]


class Cached(ctypes.Structure):
    """Keys and values of one layer, token-major."""

    _fields_ = [("kind", _I), ("key_heads", _I), ("value_heads", _I), ("dim", _I), ("dim_v", _I), ("keys", _P), ("values", _P), ("key_scales", _P), ("value_scales", _P)]


class Operation(ctypes.Structure):
    """One operation of a step; source/step.c says which fields each reads."""

    _fields_ = [
        *((name, _I) for name in ("kind", "wait", "stride", "from_", "to", "gated", "rows", "counts", "n", "heads", "head_stride", "dim",
                                  "layer", "window", "mode", "keep", "exempt", "offset", "add", "together")),
        ("factor", _F), ("eps", _F), ("table", _P), ("gain", _P), ("shift", _P), ("matrix", Matrix), ("kept", _I),
    ]


class Step(ctypes.Structure):
    """A program and the memory that it runs in."""

    _fields_ = [
        ("operations", _P), ("layers", _P), ("shared", _P), ("own", _P), ("own_rows", _P), ("scores", _P),
        *((name, _I) for name in ("operation_count", "own_stride", "own_rows_stride", "score_room", "threads")),
        ("tokens", _P), ("token_count", _I), ("position", _I),
    ]


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first entry; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def kind_of(dtype: torch.dtype) -> int:
    """The library's number of a dtype.

    Raises:
        ValueError: it has none.
    """
    numbers: dict[Any, int] = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}
    if dtype not in numbers:
        raise ValueError(f"{dtype} is none of {', '.join(map(str, numbers))}")
    return numbers[dtype]
