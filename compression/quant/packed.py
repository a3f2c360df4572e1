"""int8 and int4 weights in the project's own packed form: stored smaller, and read packed by the native runtime."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from compression.quant.technique import quantisable_layers
from core.bundle import Bundle, storage_bytes, tensors_of
from core.errors import UnsupportedModel
from core.linear_layers import is_plain_linear, linear_weight
from core.reversible import Edits
from core.technique import Effect, Label, Prepared, Report, Stage, Technique, option
from kernels.kept_packings import KeptPackings
from kernels.packed_linear import PackedLinear
from kernels.packing import PackedWeight


@dataclass(frozen=True)
class _Packed(Technique):
    effect: ClassVar[Effect] = Effect.LOSSY
    stage: ClassVar[Stage] = Stage.PACKING

    head: bool = option(True, "Also the output head, in int8")
    share: float = option(1.0, "Share of the linear layers to quantise, first to last", minimum=0.0, maximum=1.0, step=0.05, neutral=0.0)

    def check(self, bundle: Bundle) -> None:
        """Refuses a model without full-precision linear layers, and other devices than the CPU.

        Raises:
            UnsupportedModel: with the reason.
        """
        super().check(bundle)
        if not any(is_plain_linear(layer) for _, layer in quantisable_layers(bundle.model)):
            raise UnsupportedModel(f"{self.name}: {bundle.info.model_id} has no full-precision linear layer to quantise.")
        if bundle.device.type != "cpu":
            raise UnsupportedModel(f"{self.name}: the model is on {bundle.device}; these kernels run on the CPU.")

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        layers = list(self._layers(bundle))
        plain = [row for row in layers if is_plain_linear(row[1])]
        chosen = plain[: math.ceil(round(self.share * len(plain), 9))]
        skipped = {path: f"a {type(layer).__name__}, not a full-precision linear layer" for path, layer, _ in layers if not is_plain_linear(layer)}
        skipped.update((path, f"beyond the first {self.share:.0%} of layers") for path, _, _ in plain[len(chosen) :])
        before = storage_bytes(tensors_of(layer for _, layer, _ in chosen))
        packed = []
        with KeptPackings() as kept:
            for path, layer, is_head in chosen:
                if is_head and getattr(bundle.model.config, "tie_word_embeddings", False):
                    edits.set_attr(bundle.model.config, "tie_word_embeddings", False)  # else loading and saving would tie the head again
                new = PackedLinear.in_place_of(layer, self.pack_head(layer, kept) if is_head else self.pack_layer(layer, kept))
                edits.swap_module(bundle.model, path, new)
                packed.append(new)
        if not self.head:
            skipped["output head"] = "left as it is; the option head packs it in int8"
        notes = ("the prompt is multiplied with the packed weights in C where there is a compiler, else torch unpacks them; decode reads them packed where the native runtime is on", *filter(None, [kept.note()]))
        return Report(self.name, Label.STORED, tuple(p for p, _, _ in chosen), skipped, sum(before.values()), sum(storage_bytes(tensors_of(packed)).values()), notes), tuple(packed)

    def _layers(self, bundle: Bundle) -> Iterator[tuple[str, nn.Module, bool]]:
        """Path, layer, and whether it is the output head."""
        for path, layer in quantisable_layers(bundle.model):
            yield path, layer, False
        head: Any = bundle.model.get_output_embeddings()
        if self.head and head is not None:
            yield next(path for path, module in bundle.model.named_modules() if module is head), head, True

    @abstractmethod
    def pack_layer(self, layer: nn.Module, kept: KeptPackings) -> PackedWeight:
        """A layer's weight, packed."""

    def pack_head(self, layer: nn.Module, kept: KeptPackings) -> PackedWeight:
        """The output head's weight: int8, whatever the others are."""
        return kept.pack(linear_weight(layer)[0], "int8")


@dataclass(frozen=True)
class Int8(_Packed):
    """Symmetric int8 weights, one scale for each output channel.

    Source: round to nearest, as in Jacob et al. 2018 (arXiv 1712.05877), section 2, without zero points. Activations stay in floating point.
    """

    name: ClassVar[str] = "int8"
    title: ClassVar[str] = "int8 weights"
    summary: ClassVar[str] = "Weights as 8-bit integers with one scale for each output; inputs stay in floating point."

    def pack_layer(self, layer: nn.Module, kept: KeptPackings) -> PackedWeight:
        """In int8."""
        return kept.pack(linear_weight(layer)[0], "int8")


@dataclass(frozen=True)
class Int4(_Packed):
    """Symmetric int4 weights in groups of input channels, the scale of least squared error of six.

    Source: round to nearest in groups, as llama.cpp's Q4_0; scale search as in AWQ's clipping (arXiv 2306.00978), on weights alone.
    """

    name: ClassVar[str] = "int4"
    title: ClassVar[str] = "int4 weights"
    summary: ClassVar[str] = "Weights as 4-bit integers, one bfloat16 scale for each group of inputs; the output head in int8."

    group_size: int = option(64, "Input channels that share a scale", choices=(32, 64, 128))

    def pack_layer(self, layer: nn.Module, kept: KeptPackings) -> PackedWeight:
        """In int4."""
        return kept.pack(linear_weight(layer)[0], "int4", self.group_size)
