"""Where a model of a known family keeps what LaRoSA works on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from core.architectures import Architecture, architecture_of
from core.errors import UnsupportedModel
from core.linear_layers import is_plain_linear, linear_weight


@dataclass(frozen=True)
class Norm:
    """A norm inside a block and the layers that read what it gives. Names are relative to the block."""

    kind: str  # "attention" | "mlp"
    name: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    """A model, its row of the table, and what follows from both."""

    model: PreTrainedModel
    architecture: Architecture

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return self.architecture.block_list(self.model)

    @property
    def decoder(self) -> nn.Module:
        """The module that runs the blocks; every call of the model goes through it."""
        return self.model.get_submodule(self.architecture.blocks.rpartition(".")[0])

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms of a block: two, or one that both halves of a parallel block read."""
        a = self.architecture
        if a.attention_norm == a.mlp_norm:
            return (Norm("attention", a.attention_norm, (*a.qkv, *a.mlp_in)),)
        return Norm("attention", a.attention_norm, a.qkv), Norm("mlp", a.mlp_norm, a.mlp_in)

    @property
    def writers(self) -> tuple[tuple[str, str], ...]:
        """Kind of site and name of the layers that write to the residual stream."""
        return (("output", self.architecture.output), ("down", self.architecture.mlp_out))

    @property
    def centred(self) -> bool:
        """True where the norms are LayerNorms."""
        return isinstance(self.blocks[0].get_submodule(self.architecture.attention_norm), nn.LayerNorm)

    @property
    def activation(self) -> str:
        """The MLP's activation function by its name in the configuration."""
        config: Any = self.model.config
        return str(next(v for name in ("hidden_act", "activation_function", "hidden_activation") if (v := getattr(config, name, None))))

    @property
    def gate(self) -> str | None:
        """Name of the gate's activation module in a block, None where the MLP has no gate."""
        return "mlp.act_fn" if len(self.architecture.mlp_in) == 2 else None

    def path(self, block: int, name: str) -> str:
        """Dotted path of a block's part from the model's root."""
        return f"{self.architecture.blocks}.{block}.{name}"

    def path_of(self, module: nn.Module) -> str:
        """Dotted path of a module of the model."""
        return next(path for path, found in self.model.named_modules() if found is module)

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Every projection inside the blocks by path."""
        yield from self.architecture.projections(self.model).items()


def structure_of(model: PreTrainedModel, technique: str) -> Structure:
    """The structure of a model that rotations can be absorbed into.

    Raises:
        UnsupportedModel: unknown family, projections around the blocks, or layers that are quantised or adapted.
    """
    structure = Structure(model, architecture_of(model, technique))
    head = model.get_output_embeddings()
    for path, layer in (*structure.layers(), ("the output head", head)):
        if not is_plain_linear(layer):
            kind = f"{type(layer).__module__.split('.')[0]}.{type(layer).__name__}"
            raise UnsupportedModel(f"{technique} rewrites full-precision weights, and {path} is a {kind}. Merge adapters, and quantise after it, not before.")
    if not _has_module(model, structure.architecture.final_norm):
        raise UnsupportedModel(f"{technique}: the model has no norm before its head, so the last rotation cannot be absorbed.")
    width = model.config.get_text_config().hidden_size
    table: Any = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise UnsupportedModel(f"{technique} rewrites the embedding table, and it is a {type(table).__name__}. Merge adapters first.")
    if table.weight.shape[1] != width:
        raise UnsupportedModel(f"{technique}: embeddings of {table.weight.shape[1]} channels are projected to {width} before the blocks, so no rotation can be absorbed into them.")
    return structure


def _has_module(model: nn.Module, path: str | None) -> bool:
    try:
        return path is not None and model.get_submodule(path) is not None
    except AttributeError:
        return False


def norm_eps(norm: nn.Module) -> float:
    """The epsilon of a LayerNorm or an RMSNorm."""
    value: Any = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if value is None else value)  # type: ignore[arg-type]


def weight_count(layer: nn.Module) -> int:
    """Entries of a layer's weight."""
    return linear_weight(layer)[0].numel()
