"""Weights as the GEMV kernels read them: tile by tile, each input channel's weights of a tile side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 128
"""Outputs of one tile; the same number as in source/gemv.c."""

KINDS = ("float32", "bfloat16", "int8", "int4")
_MIDDLE = 8


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix [out_features, in_features] for `kernels.gemv`.

    kind: one of KINDS.
    data: [tiles, in_features, TILE] float32, bfloat16 or int8; [tiles, in_features, TILE / 2] uint8 for int4.
    scale: float32; [tiles * TILE] for int8, [tiles, groups, TILE] for int4, None for floats.
    group_size: input channels that share a scale in int4, 0 otherwise.
    """

    kind: str
    out_features: int
    in_features: int
    data: Tensor
    scale: Tensor | None = None
    group_size: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)


def _tiles(weight: Tensor) -> Tensor:
    """[out, in] -> [tiles, in, TILE], outputs beyond the last one zero."""
    out, inside = weight.shape
    tiles = -(-out // TILE)
    padded = weight.new_zeros(tiles * TILE, inside)
    padded[:out] = weight
    return padded.reshape(tiles, TILE, inside).transpose(1, 2).contiguous()


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per output channel: codes [out, in] int8 and scales [out] float32, weight = code * scale."""
    wide = weight.float()
    scale = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric int4 per output channel and group of input channels.

    Returns:
        codes [out, in] int8 in [-7, 7] and scales [out, groups] float32; the last group may be short.
    """
    out, inside = weight.shape
    groups = -(-inside // group_size)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * group_size - inside)).reshape(out, groups, group_size)
    scale = (padded.abs().amax(-1) / 7).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (padded / scale[..., None]).round().clamp(-7, 7).to(torch.int8)
    return codes.reshape(out, -1)[:, :inside].contiguous(), scale


def pack(weight: Tensor, kind: str, group_size: int = 64) -> PackedWeight:
    """Pack a weight.

    Args:
        weight: [out_features, in_features], any float dtype.
        kind: one of KINDS; the integers are quantised here.
        group_size: for int4.

    Raises:
        ValueError: unknown kind, or a group size below 1.
    """
    out, inside = weight.shape
    if kind in ("float32", "bfloat16"):
        return PackedWeight(kind, out, inside, _tiles(weight.detach().to(getattr(torch, kind))))
    if kind == "int8":
        codes, scale = quantize_int8(weight.detach())
        return PackedWeight(kind, out, inside, _tiles(codes), torch.nn.functional.pad(scale, (0, -out % TILE)))
    if kind != "int4" or group_size < 1:
        raise ValueError(f"kind is {kind!r} with groups of {group_size}; use one of {', '.join(KINDS)} and groups of 1 or more")
    codes, scale = quantize_int4(weight.detach(), group_size)
    nibbles = (_tiles(codes) + _MIDDLE).to(torch.uint8)
    data = nibbles[..., : TILE // 2] | nibbles[..., TILE // 2 :] << 4
    return PackedWeight(kind, out, inside, data.contiguous(), _tiles(scale), group_size)


def unpack(packed: PackedWeight) -> Tensor:
    """The weight [out_features, in_features] float32 that the kernel computes with: the reference of every packed form."""
    data = packed.data
    if packed.kind == "int4":
        data = torch.cat([data & 15, data >> 4], -1).to(torch.int8) - _MIDDLE
    wide = data.float()
    if packed.kind == "int4":
        assert packed.scale is not None
        wide = wide * packed.scale.repeat_interleave(packed.group_size, 1)[:, : packed.in_features]
    flat = wide.transpose(1, 2).reshape(-1, packed.in_features)[: packed.out_features]
    if packed.kind == "int8":
        assert packed.scale is not None
        flat = flat * packed.scale[: packed.out_features, None]
    return flat.contiguous()
