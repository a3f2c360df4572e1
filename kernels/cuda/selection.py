"""Which input channels of a vector are worth reading weights for, found on the device: no step waits for a count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BITS = {torch.float32: (torch.int32, 31), torch.float16: (torch.int16, 15), torch.bfloat16: (torch.int16, 15)}
"""The integer that a float's bits are read as, and how many of them are magnitude."""

TICKETS = 1024
"""Blocks of outputs that programs of a product can share."""


@dataclass(frozen=True)
class Selection:
    """Channels that are kept of a vector of n entries.

    rows: [n] int32; the first `count` are the channels, ascending; what follows them is undefined.
    count: [1] int32, on the device.
    most: the count is no higher than this; known without asking the device.
    kept: the vector in its own shape and dtype, zero where it was not chosen.
    tickets: [TICKETS] int32, zeros: products count in them which program comes last, one product after the other, and leave zeros.
    """

    rows: Tensor
    count: Tensor
    most: int
    kept: Tensor
    tickets: Tensor

    def is_of(self, x: Tensor) -> bool:
        """Whether `x` is the selected vector itself, in whatever shape."""
        return x.data_ptr() == self.kept.data_ptr() and x.numel() == self.kept.numel()


@triton.jit
def _store(chosen, values, places, inside, kept, rows, count, tickets, TICKETS: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    tl.store(tickets + tl.arange(0, TICKETS), tl.zeros([TICKETS], dtype=tl.int32))
    target = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(rows + target, places, mask=chosen)
    tl.store(count, tl.sum(chosen.to(tl.int32), 0))
    tl.store(kept + places, tl.where(chosen, values, tl.zeros_like(values)), mask=inside)


@triton.jit
def _largest(x, magnitudes, keep, kept, rows, count, tickets, n, BITS: tl.constexpr, BLOCK: tl.constexpr, TICKETS: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    places = tl.arange(0, BLOCK)
    inside = places < n
    # Magnitudes of floats order as their bits do; -1 is below them all.
    bits = tl.load(magnitudes + places, mask=inside, other=0).to(tl.int32) & ((1 << BITS) - 1 if BITS < 31 else 0x7FFFFFFF)
    bits = tl.where(inside, bits, -1)
    edge = 0  # becomes the keep-th largest magnitude, from its highest bit down
    for step in range(BITS):
        higher = edge | (1 << (BITS - 1 - step))
        edge = tl.where(tl.sum((bits >= higher).to(tl.int32), 0) >= keep, higher, edge)
    above = bits > edge
    equal = bits == edge
    left = keep - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
    _store(chosen, tl.load(x + places, mask=inside, other=0.0), places, inside, kept, rows, count, tickets, TICKETS)


@triton.jit
def _above(x, threshold, kept, rows, count, tickets, n, NONZERO: tl.constexpr, BLOCK: tl.constexpr, TICKETS: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    places = tl.arange(0, BLOCK)
    inside = places < n
    values = tl.load(x + places, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    chosen = wide != 0.0 if NONZERO else tl.abs(wide) > threshold  # a NaN is not zero: it is kept, and shows
    _store(chosen & inside, values, places, inside, kept, rows, count, tickets, TICKETS)


def largest(x: Tensor, keep: int) -> Selection:
    """The `keep` entries of largest magnitude, of equal ones the first: `kernels.channels.largest` on the device.

    Args:
        x: one vector in any shape, float32, float16 or bfloat16, contiguous; a NaN counts as larger than any number.
        keep: 0 to n; more is n.
    """
    n = _checked(x)
    keep = min(max(keep, 0), n)
    rows, count, kept, tickets = _buffers(x)
    kind, bits = _BITS[x.dtype]
    block = triton.next_power_of_2(n)
    _largest[(1,)](x, x.view(kind), keep, kept, rows, count, tickets, n, BITS=bits, BLOCK=block, TICKETS=TICKETS, num_warps=_warps(block))
    return Selection(rows, count, keep, kept, tickets)


def above(x: Tensor, threshold: float) -> Selection:
    """Entries of magnitude above `threshold`, which is first rounded to x's dtype as torch does in a comparison."""
    n = _checked(x)
    return _compared(x, n, float(torch.tensor(threshold, dtype=x.dtype)), nonzero=False)


def nonzero(x: Tensor) -> Selection:
    """Entries that are not exactly zero."""
    return _compared(x, _checked(x), 0.0, nonzero=True)


def _compared(x: Tensor, n: int, threshold: float, *, nonzero: bool) -> Selection:
    rows, count, kept, tickets = _buffers(x)
    block = triton.next_power_of_2(n)
    _above[(1,)](x, threshold, kept, rows, count, tickets, n, NONZERO=nonzero, BLOCK=block, TICKETS=TICKETS, num_warps=_warps(block))
    return Selection(rows, count, n, kept, tickets)


def _checked(x: Tensor) -> int:
    if x.dtype not in _BITS or not x.is_contiguous() or x.numel() == 0:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it must be a contiguous vector in {', '.join(str(d)[6:] for d in _BITS)}")
    return x.numel()


def _buffers(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tickets, rows, count = torch.empty(TICKETS + x.numel() + 1, dtype=torch.int32, device=x.device).split([TICKETS, x.numel(), 1])
    return rows, count, torch.empty_like(x), tickets


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16
