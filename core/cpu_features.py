"""What the processor does itself, as far as choices depend on it."""

from __future__ import annotations

import torch


def multiplies_bf16(device: str) -> bool:
    """Whether products of bfloat16 are fast on the device; a CPU without instructions for them takes several times as long as in float32."""
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
