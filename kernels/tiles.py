"""The configuration of the CPU's matrix registers (AMX), which belongs to a thread and outlives a call."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from kernels.build import native

_LAYOUT = "<2B14x16H16B"


@contextmanager
def tiles_configured(rows: Sequence[int], line_bytes: Sequence[int]) -> Iterator[None]:
    """Within it torch's OpenMP threads have the matrix registers as said, afterwards as before.

    For other people's code that configures a thread once and counts on it: torch's products and ours configure the same registers, and its
    next use would be an illegal instruction. Nothing happens on CPUs without such registers.

    Args:
        rows, line_bytes: of registers 0, 1, ...; 16 and 64 at most.
    """
    library = native().library
    wanted = struct.pack(_LAYOUT, 1, 0, *_filled(line_bytes), *_filled(rows))
    room = ctypes.create_string_buffer(wanted * torch.get_num_threads(), len(wanted) * torch.get_num_threads())
    if library is not None:
        library.fusebox_exchange_tiles(room)
    try:
        yield
    finally:
        if library is not None:
            library.fusebox_exchange_tiles(room)


def _filled(values: Sequence[int]) -> list[int]:
    return [*values, *[0] * (16 - len(values))]
