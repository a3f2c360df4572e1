"""bitsandbytes int8 and nf4 as techniques: the reference methods for quantised weights."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.bundle import Bundle, storage_bytes, tensors_of
from core.errors import UnsupportedModel
from core.reversible import Edits
from core.technique import Effect, Label, Prepared, Report, Stage, Technique, option


def quantisable_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers by path, first to last; the output head is not among them."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            yield path, module


@dataclass(frozen=True)
class _BitsAndBytes(Technique):
    effect: ClassVar[Effect] = Effect.LOSSY
    stage: ClassVar[Stage] = Stage.WEIGHTS

    share: float = option(1.0, "Share of the linear layers to quantise, first to last", minimum=0.0, maximum=1.0, step=0.05, neutral=0.0)

    def check(self, bundle: Bundle) -> None:
        """Refuses a model that has no full-precision linear layer left.

        Raises:
            UnsupportedModel: nothing to quantise.
        """
        super().check(bundle)
        layers = [layer for _, layer in quantisable_layers(bundle.model) if next(layer.parameters()).is_floating_point()]
        if not layers:
            raise UnsupportedModel(f"{self.name}: {bundle.info.model_id} has no full-precision linear layer to quantise.")
        reasons = [self.refuses(layer) for layer in layers]
        if all(reasons):
            raise UnsupportedModel(f"{self.name} fits no layer of {bundle.info.model_id}: {reasons[0]}.")

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        layers = list(quantisable_layers(bundle.model))
        skipped = {path: reason for path, layer in layers if (reason := self.refuses(layer))}
        fit = [(path, layer) for path, layer in layers if path not in skipped]
        chosen = fit[: math.ceil(round(self.share * len(fit), 9))]
        skipped.update((path, f"beyond the first {self.share:.0%} of layers") for path, _ in fit[len(chosen) :])
        skipped["output head"] = "kept in full precision, as bitsandbytes does"
        before = storage_bytes(tensors_of(layer for _, layer in chosen))
        packed = []
        for path, layer in chosen:
            new = self.quantise(layer)
            edits.swap_module(bundle.model, path, new)
            packed.append(new)
        after = storage_bytes(tensors_of(packed))
        executed = sum(self.runs_packed(layer, bundle.device.type) for layer in packed)
        notes = (f"{executed} of {len(packed)} layers compute with the packed weights; the others unpack them at each call",)
        label = Label.EXECUTED if packed and executed == len(packed) else Label.STORED
        report = Report(self.name, label, tuple(path for path, _ in chosen), skipped, sum(before.values()), sum(after.values()), notes)
        return report, tuple(packed)

    def refuses(self, layer: nn.Module) -> str | None:
        """Why a layer is left as it is; None when it is quantised."""
        return None

    @abstractmethod
    def quantise(self, layer: nn.Module) -> nn.Module:
        """The layer's quantised counterpart."""

    @abstractmethod
    def runs_packed(self, layer: nn.Module, device: str) -> bool:
        """Whether this machine computes with the layer's packed weights, rather than unpacking them first."""


@dataclass(frozen=True)
class BnbInt8(_BitsAndBytes):
    """LLM.int8(): vector-wise int8 weights and activations, outlier columns in full precision.

    Source: Dettmers et al. 2022 (arXiv 2208.07339), section 3; library bitsandbytes, which passes inputs through fp16.
    """

    name: ClassVar[str] = "bnb_int8"
    title: ClassVar[str] = "int8 weights (bitsandbytes)"
    summary: ClassVar[str] = "LLM.int8(): weights and activations as 8-bit integers, outlier columns in full precision."

    threshold: float = option(6.0, "Activation columns with a value above this are computed in full precision (0: none)", minimum=0.0, maximum=100.0, step=0.5)

    def quantise(self, layer: nn.Module) -> nn.Module:
        """The layer in int8."""
        from compression.quant.modules import int8_linear

        return int8_linear(layer, self.threshold)

    def runs_packed(self, layer: nn.Module, device: str) -> bool:
        """True on CUDA and on CPUs with AVX-512 (`torch._int_mm`)."""
        return device == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"


@dataclass(frozen=True)
class BnbNf4(_BitsAndBytes):
    """NormalFloat4 weights in blocks.

    Source: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3; library bitsandbytes.
    """

    name: ClassVar[str] = "bnb_nf4"
    title: ClassVar[str] = "nf4 weights (bitsandbytes)"
    summary: ClassVar[str] = "NormalFloat4: weights as 4-bit codes in blocks with one scale each."

    block_size: int = option(64, "Weights that share a scale", choices=(64, 128, 256, 512, 1024))
    double_quant: bool = option(False, "Store the scales in 8 bits too; the fused CPU kernel cannot use them, so weights are then unpacked at each call")

    def refuses(self, layer: nn.Module) -> str | None:
        """Rows that share a block of scales are unpacked wrongly by bitsandbytes 0.50 on CPUs with AVX-512."""
        inside = layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.weight.shape[1]  # type: ignore[operator,union-attr,index]
        if inside % self.block_size and torch.backends.cpu.get_cpu_capability() == "AVX512":  # type: ignore[operator]
            return f"{inside} inputs are no multiple of the block of {self.block_size}, which bitsandbytes computes wrongly on this CPU"
        return None

    def quantise(self, layer: nn.Module) -> nn.Module:
        """The layer in nf4."""
        from compression.quant.modules import nf4_linear

        return nf4_linear(layer, self.block_size, self.double_quant)

    def runs_packed(self, layer: nn.Module, device: str) -> bool:
        """True on CUDA, and on CPUs with AVX512-BF16 for shapes that the fused kernel takes."""
        return device == "cuda" or bool(layer.support_avx512bf16_for_cpu)
