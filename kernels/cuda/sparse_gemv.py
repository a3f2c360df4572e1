"""Matrix times vector over some input channels in Triton: the weights of the others are not read."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.selection import TICKETS, Selection

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK_OUT, _BLOCK_ROWS, _WARPS = 64, 32, 4
"""The fastest of 33 on an H100; benchmarks/LOG.md, 2026-11-27."""
_PROGRAMS_A_PROCESSOR = 8
"""Enough reads in flight to cover the latency of memory."""


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x, weight, rows, count, tickets, sums, bias, out, n_out, splits, HAS_BIAS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
) -> None:
    """One block of outputs over every `splits`-th block of the chosen channels; sums [splits, n_out] float32.

    The program that comes last adds the splits in their order, so that a result is the same each time, rounds once and clears the ticket.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = columns < n_out
    chosen = tl.load(count)
    # Products are added up where they are and across rows only once: the latter makes warps wait for each other.
    products = tl.zeros([BLOCK_ROWS, BLOCK_OUT], dtype=tl.float32)
    for start in range(split * BLOCK_ROWS, chosen, splits * BLOCK_ROWS):
        places = start + tl.arange(0, BLOCK_ROWS)
        some = places < chosen
        channels = tl.load(rows + places, mask=some, other=0).to(tl.int64)
        values = tl.load(x + channels, mask=some, other=0.0).to(tl.float32)
        tile = tl.load(weight + channels[:, None] * n_out + columns[None, :], mask=some[:, None] & inside[None, :], other=0.0).to(tl.float32)
        products += values[:, None] * tile
    total = tl.sum(products, 0)
    last = True
    if splits > 1:
        tl.store(sums + split * n_out + columns, total, mask=inside)
        tl.debug_barrier()
        last = tl.atomic_add(tickets + block, 1) == splits - 1
    if last:
        if splits > 1:
            tl.store(tickets + block, 0)
            total = tl.zeros([BLOCK_OUT], dtype=tl.float32)
            for other in range(splits):
                total += tl.load(sums + other * n_out + columns, mask=inside, other=0.0, cache_modifier=".cg")
        if HAS_BIAS:
            total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + columns, total.to(out.dtype.element_ty), mask=inside)


def sparse_gemv(weight: Tensor, selection: Selection, bias: Tensor | None = None, splits: int | None = None) -> Tensor:
    """y = W[:, rows] x[rows] + bias.

    Args:
        weight: [in_features, out_features], contiguous, so that a channel left out is one piece of memory not read.
        selection: of the vector x [in_features] in the weight's dtype.
        bias: [out_features] in any float dtype.
        splits: programs that share a block of outputs; as many as keep the device busy when None.

    Returns:
        [out_features] in the weight's dtype; sums in float32, rounded once.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    x = selection.kept
    _check(weight, x, bias)
    n_out = weight.shape[1]
    blocks = triton.cdiv(n_out, _BLOCK_OUT)
    splits = (splits or _splits(blocks, selection.most, weight.device)) if blocks <= TICKETS else 1
    sums = torch.empty(splits, n_out, dtype=torch.float32, device=weight.device)
    out = torch.empty(n_out, dtype=weight.dtype, device=weight.device)
    _product[(blocks, splits)](
        x, weight, selection.rows, selection.count, selection.tickets, sums, bias if bias is not None else sums, out, n_out, splits,
        HAS_BIAS=bias is not None, BLOCK_OUT=_BLOCK_OUT, BLOCK_ROWS=_BLOCK_ROWS, num_warps=_WARPS,
    )
    return out


def sparse_gemv_reference(weight: Tensor, x: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in float64 by torch, not rounded.

    Args:
        weight: [in_features, out_features]. x: [in_features]. rows: [k] integers. bias: [out_features].
    """
    chosen = rows.long()
    out = x.reshape(-1).double()[chosen] @ weight.double()[chosen]
    return out if bias is None else out + bias.double()


def _check(weight: Tensor, x: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or weight.dtype not in DTYPES or not weight.is_contiguous():
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; it must be [in_features, out_features], contiguous, in {', '.join(str(d)[6:] for d in DTYPES)}")
    if x.numel() != weight.shape[0] or x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)} on {x.device}; it must have {weight.shape[0]} entries in {weight.dtype} on {weight.device}")
    if bias is not None and (bias.shape != (weight.shape[1],) or not bias.is_contiguous() or bias.device != weight.device):
        raise ValueError(f"bias is {tuple(bias.shape)} on {bias.device}; it must be [{weight.shape[1]}], contiguous, on {weight.device}")


def _splits(blocks: int, most_rows: int, device: torch.device) -> int:
    return max(1, min(triton.cdiv(_PROGRAMS_A_PROCESSOR * _processors(device), blocks), triton.cdiv(most_rows, _BLOCK_ROWS)))


@functools.lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
