"""How one layer's keys and values lie in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVLayout:
    """One layer: tokens one after the other, each with all its heads.

    k_heads may be fewer than v_heads (clustered heads). dtype: float32, bfloat16, or int8 with one float32 scale a token and head.
    """

    k_heads: int
    v_heads: int
    head_dim: int
    dtype: torch.dtype
    v_head_dim: int | None = None

    @property
    def scaled(self) -> bool:
        """True where entries are codes that need scales."""
        return self.dtype == torch.int8

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape of one token, dtype) of everything a layer keeps."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "keys": ((self.k_heads, self.head_dim), self.dtype),
            "values": ((self.v_heads, self.v_head_dim or self.head_dim), self.dtype),
        }
        if self.scaled:
            shapes |= {"key_scales": ((self.k_heads,), torch.float32), "value_scales": ((self.v_heads,), torch.float32)}
        return shapes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, keys, values and scales."""
        return sum(token_bytes(shape, dtype) for shape, dtype in self.parts().values())


def token_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of one token of a part."""
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize
