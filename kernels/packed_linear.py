"""A linear layer over a packed weight: C multiplies it as it lies; torch unpacks it where there is no library, or where gradients are wanted."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kernels.build import native
from kernels.gemm import DTYPES, gemm
from kernels.packing import TILE, PackedWeight, unpack


class PackedLinear(nn.Module):
    """y = W x + bias with W packed.

    weight_data, weight_scale: the packed tensors, as buffers.
    """

    bias: Tensor | None

    def __init__(self, packed: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.kind, self.group_size, self.by_row = packed.kind, packed.group_size, packed.by_row
        self.register_buffer("weight_data", packed.data)
        self.register_buffer("weight_scale", packed.scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def packed(self) -> PackedWeight:
        """The weight as the kernels take it; the same tensors."""
        return PackedWeight(self.kind, self.out_features, self.in_features, self.weight_data, self.weight_scale, self.group_size, self.by_row)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in x's dtype; float32 sums. What is rounded where: docs/native.md, "Prompts"."""
        if not self._runs_in_c(x):
            return self._unpacked(x)
        bias = None if self.bias is None else self.bias.float()
        return gemm(x.reshape(-1, self.in_features).contiguous(), self.packed, bias).reshape(*x.shape[:-1], self.out_features)

    def _runs_in_c(self, x: Tensor) -> bool:
        differentiable = torch.is_grad_enabled() and x.requires_grad
        return x.device.type == "cpu" and x.dtype in DTYPES and not differentiable and native().library is not None

    def _unpacked(self, x: Tensor) -> Tensor:
        """The same in torch. int8 codes are exact in bfloat16; their scales multiply the sums."""
        if self.kind != "int8":
            return nn.functional.linear(x, unpack(self.packed, x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        rows = x.reshape(1, -1, self.in_features)
        sums = torch.matmul(rows, self.packed.tiles.to(x.dtype)).transpose(0, 1).reshape(rows.shape[1], -1, TILE).flatten(1)
        out = sums[:, : self.out_features] * self.weight_scale[: self.out_features].to(x.dtype)  # type: ignore[index]
        out = out if self.bias is None else out + self.bias.to(x.dtype)
        return out.reshape(*x.shape[:-1], self.out_features)

    @classmethod
    def in_place_of(cls, layer: nn.Module, packed: PackedWeight) -> PackedLinear:
        """A packed layer for where `layer` stands: it takes over the bias and what techniques have hung on it."""
        new = cls(packed, layer.bias)  # type: ignore[arg-type]
        new._forward_hooks = copy.copy(layer._forward_hooks)
        new._forward_pre_hooks = copy.copy(layer._forward_pre_hooks)
        new.train(layer.training)
        for name, child in layer.named_children():
            new.add_module(name, child)
        return new

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}, group_size={self.group_size}"
