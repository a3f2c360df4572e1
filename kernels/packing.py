"""Weights as the GEMV kernels read them: tile by tile, each input channel's weights of a tile side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.huge_pages import empty_in_huge_pages, in_huge_pages
from kernels.structures import KIND_NUMBERS, Matrix, address

TILE = 128
"""Outputs of one tile; the same number as in source/fusebox.h."""

BLOCK = 64
"""Outputs that a thread takes at least; the same number as there."""

KINDS = ("float32", "bfloat16", "int8", "int4")
_MIDDLE = 8
_NIBBLES = 8
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Scales tried for an int4 group, as shares of its largest magnitude / 7: clipping one weight can round all others better."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix [out_features, in_features] for `kernels.gemv`.

    kind: one of KINDS.
    data: [tiles, in_features, TILE] float32, bfloat16 or int8; [tiles, in_features, TILE / 8] int32 for int4: output j of a tile is
        nibble j / 16 of word j % 16. With `by_row` the first two axes change places: all of one input channel's weights lie together, as one
        piece or a part of it.
    scale: [tiles * TILE] float32 for int8, [tiles, groups, TILE] bfloat16 for int4, None for floats.
    group_size: input channels that share a scale in int4, 0 otherwise.
    """

    kind: str
    out_features: int
    in_features: int
    data: Tensor
    scale: Tensor | None = None
    group_size: int = 0
    by_row: bool = False

    def rows_together(self) -> PackedWeight:
        """The same weights, each input channel's in one piece: for reading some channels of a matrix larger than the caches."""
        return self if self.by_row else replace(self, data=in_huge_pages(self.data.transpose(0, 1).contiguous()), by_row=True)

    def part(self, start: int, out_features: int) -> PackedWeight:
        """The outputs from `start` on, a multiple of TILE, of a weight whose rows lie together; views."""
        tiles = slice(start // TILE, -(-(start + out_features) // TILE))
        scale = None if self.scale is None else self.scale.view(self.data.shape[1], -1)[tiles].reshape(-1, *self.scale.shape[1:])
        return replace(self, out_features=out_features, data=self.data[:, tiles], scale=scale)

    @property
    def tiles(self) -> Tensor:
        """`data` with tiles first, whatever lies together; a view."""
        return self.data.transpose(0, 1) if self.by_row else self.data

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def matrix(self, bias: Tensor | None = None) -> Matrix:
        """For the C library; it points into these tensors and into `bias` [out_features] float32, which must outlive it."""
        assert self.data[0].is_contiguous() and (self.by_row or self.data.is_contiguous())
        row_tiles = self.data.stride(0) // self.data.shape[-1] if self.by_row else 0
        return Matrix(KIND_NUMBERS[self.kind], self.in_features, self.out_features, self.group_size, row_tiles, address(self.data), address(self.scale), address(bias))


def side_by_side(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Matrices over the same input as one, all of an input channel's weights in one piece; each matrix begins at a whole tile.

    Raises:
        ValueError: kinds, inputs or groups differ.
    """
    first = weights[0]
    if any((w.kind, w.in_features, w.group_size) != (first.kind, first.in_features, first.group_size) for w in weights):
        raise ValueError("matrices that lie side by side must have the same kind, inputs and groups")
    data = in_huge_pages(torch.cat([w.tiles.transpose(0, 1) for w in weights], 1))
    scale = None if first.scale is None else torch.cat([w.scale for w in weights])  # type: ignore[misc]
    return PackedWeight(first.kind, sum(-(-w.out_features // TILE) * TILE for w in weights), first.in_features, data, scale, first.group_size, True)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per output channel: codes [out, in] int8 and scales [out] float32, weight = code * scale."""
    wide = weight.float()
    scale = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric int4 per output channel and group of input channels; of a few scales the one with the least squared error.

    Returns:
        codes [out, in] int8 in [-8, 7] and scales [out, groups] bfloat16; the last group may be short.
    """
    out, inside = weight.shape
    groups = -(-inside // group_size)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * group_size - inside)).reshape(out, groups, group_size)
    largest = padded.abs().amax(-1, keepdim=True)
    best, scale, codes = torch.full_like(largest, torch.inf), torch.ones_like(largest), torch.zeros_like(padded)
    for shrink in _SHRINK:
        tried = (largest * (shrink / 7)).bfloat16().float().clamp(min=torch.finfo(torch.bfloat16).tiny)
        rounded = (padded / tried).round().clamp(-8, 7)
        error = (rounded * tried - padded).square().sum(-1, keepdim=True)
        better = error < best
        best, scale, codes = torch.where(better, error, best), torch.where(better, tried, scale), torch.where(better, rounded, codes)
    return codes.to(torch.int8).reshape(out, -1)[:, :inside].contiguous(), scale[..., 0].bfloat16()


def pack(weight: Tensor, kind: str, group_size: int = 64) -> PackedWeight:
    """Pack a weight, tile by tile: what is computed on the way then stays in the processor's cache.

    Args:
        weight: [out_features, in_features], any float dtype.
        kind: one of KINDS; the integers are quantised here.
        group_size: for int4.

    Raises:
        ValueError: unknown kind, or a group size below 1.
    """
    if kind not in KINDS or group_size < 1:
        raise ValueError(f"kind is {kind!r} with groups of {group_size}; use one of {', '.join(KINDS)} and groups of 1 or more")
    out, inside = weight.shape
    layout = packed_layout(out, inside, kind, group_size)
    data = empty_in_huge_pages(layout["data"][1], layout["data"][0])
    scale = torch.empty(layout["scale"][1], dtype=layout["scale"][0]) if "scale" in layout else None
    scales = None if scale is None else scale.view(data.shape[0], -1, TILE)
    for tile, rows in enumerate(weight.detach().split(TILE)):
        codes, of_codes = _quantized(rows, kind, group_size)
        codes = torch.nn.functional.pad(codes, (0, 0, 0, TILE - rows.shape[0])).T
        data[tile] = _nibbles(codes) if kind == "int4" else codes
        if scales is not None and of_codes is not None:
            scales[tile] = torch.nn.functional.pad(of_codes, (0, 0, 0, TILE - rows.shape[0])).T
    return PackedWeight(kind, out, inside, data, scale, group_size if kind == "int4" else 0)


def _quantized(rows: Tensor, kind: str, group_size: int) -> tuple[Tensor, Tensor | None]:
    """Codes, or floats, [out, in] and their scales [out, groups]."""
    if kind == "int4":
        return quantize_int4(rows, group_size)
    if kind == "int8":
        codes, scale = quantize_int8(rows)
        return codes, scale[:, None]
    return rows, None


def _nibbles(codes: Tensor) -> Tensor:
    """int4 codes [in, TILE] int8 -> [in, TILE / 8] int32."""
    parts = (codes + _MIDDLE).int().reshape(-1, _NIBBLES, TILE // _NIBBLES).unbind(1)
    words = parts[0].clone()
    for place, part in enumerate(parts[1:], 1):
        words |= part << 4 * place
    return words


def packed_layout(out_features: int, in_features: int, kind: str, group_size: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of `data` and, for integers, `scale` of what `pack` makes of a weight."""
    tiles = -(-out_features // TILE)
    if kind in ("float32", "bfloat16"):
        return {"data": (getattr(torch, kind), (tiles, in_features, TILE))}
    if kind == "int8":
        return {"data": (torch.int8, (tiles, in_features, TILE)), "scale": (torch.float32, (tiles * TILE,))}
    return {"data": (torch.int32, (tiles, in_features, TILE // _NIBBLES)), "scale": (torch.bfloat16, (tiles, -(-in_features // group_size), TILE))}


def unpack(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out_features, in_features] that the kernel computes with, rounded to `dtype`: the reference of every packed form."""
    data = packed.tiles
    wide = torch.bfloat16 if dtype == torch.bfloat16 and packed.kind != "int8" else torch.float32  # codes times bfloat16 scales round the same in either
    if packed.kind == "int4":
        assert packed.scale is not None
        codes = torch.cat([data >> 4 * place & 15 for place in range(_NIBBLES)], -1) - _MIDDLE
        values = codes.to(wide) * packed.scale.to(wide).repeat_interleave(packed.group_size, 1)[:, : packed.in_features]
    else:
        values = data if packed.kind == str(dtype).removeprefix("torch.") else data.to(wide)
    flat = values.transpose(1, 2).reshape(-1, packed.in_features)[: packed.out_features]
    if packed.kind == "int8":
        assert packed.scale is not None
        flat = flat * packed.scale[: packed.out_features, None]
    return flat.to(dtype).contiguous()
