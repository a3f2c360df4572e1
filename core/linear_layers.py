"""Linear layers whatever they are called: nn.Linear keeps [out, in], transformers' Conv1D keeps [in, out]."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

M = TypeVar("M", bound=nn.Module)


def is_plain_linear(layer: nn.Module) -> bool:
    """True for an unmodified nn.Linear or Conv1D in floating point; quantised, adapted and other subclasses are not."""
    return type(layer) in (nn.Linear, Conv1D) and layer.weight.is_floating_point()  # type: ignore[operator,union-attr]


def linear_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight as [out_features, in_features] and bias of an nn.Linear or a Conv1D; views of the layer's own tensors."""
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    bias = layer.bias
    assert isinstance(weight, Tensor)
    return weight.detach(), bias.detach() if isinstance(bias, Tensor) else None


def with_parameters(layer: M, weight: Tensor, bias: Tensor | None = None) -> M:
    """A copy of a linear or embedding layer with other values; the layer itself is left alone.

    Args:
        layer: nn.Linear, Conv1D or nn.Embedding, subclasses included.
        weight: [out_features, in_features], or [num_embeddings, embedding_dim]; cast to the layer's dtype.
        bias: [out_features]; None for none. Embeddings have none.
    """
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    new._forward_hooks = copy.copy(layer._forward_hooks)
    new._forward_pre_hooks = copy.copy(layer._forward_pre_hooks)
    old: Tensor = layer.weight  # type: ignore[assignment]
    stored = weight.T if isinstance(layer, Conv1D) else weight
    new._parameters["weight"] = nn.Parameter(stored.to(old.dtype).contiguous(), requires_grad=False)
    if "bias" in new._parameters or bias is not None:
        new._parameters["bias"] = None if bias is None else nn.Parameter(bias.to(old.dtype), requires_grad=False)
    return new
