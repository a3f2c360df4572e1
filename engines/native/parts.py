"""What the compiler reads off torch modules: weights, norms, sites. A part without a native counterpart is named."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.linear_layers import is_plain_linear, linear_weight
from kernels.packed_linear import PackedLinear
from kernels.packing import PackedWeight, pack
from optim.larosa.modules import ExactZeroSite, PlainNorm, Site, ThresholdSite, TopKSite

_RMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm", "GraniteRMSNorm")


class NotNative(Exception):
    """A part has no native counterpart; says which and why."""


@dataclass(frozen=True)
class Linear:
    """A linear layer ready for the kernels; bias float32. path: where it stands in the model, in words where it is no layer of it."""

    weight: PackedWeight
    bias: Tensor | None
    path: str


def linear_part(layer: nn.Module, path: str) -> Linear:
    """A linear layer's packed weight.

    Raises:
        NotNative: quantised by another library, adapted, hooked, or in a dtype that the kernels do not read.
    """
    if isinstance(layer, PackedLinear):
        return Linear(layer.packed, None if layer.bias is None else layer.bias.float(), path)
    if not is_plain_linear(layer):
        raise NotNative(f"{path} is a {type(layer).__module__.split('.')[0]}.{type(layer).__name__}")
    weight, bias = linear_weight(layer)
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise NotNative(f"{path} is in {weight.dtype}")
    return Linear(pack(weight, str(weight.dtype).removeprefix("torch.")), None if bias is None else bias.float().contiguous(), path)


@dataclass(frozen=True)
class Norm:
    """A norm's numbers. rotation: what its output is multiplied with."""

    gain: Tensor | None
    shift: Tensor | None
    eps: float
    centre: bool
    rotation: Tensor | None
    site: Site | None


def norm_part(norm: nn.Module, path: str) -> Norm:
    """A norm's numbers and the site behind it.

    Raises:
        NotNative: another kind of norm.
    """
    site = _site_of(norm)
    if isinstance(norm, PlainNorm):
        return Norm(None, None, norm.eps, norm.centre, norm.rotation, site)
    if isinstance(norm, nn.LayerNorm):
        return Norm(_float(norm.weight), _float(norm.bias), norm.eps, True, None, site)
    if type(norm).__name__ in _RMS:
        return Norm(_float(norm.weight), None, float(norm.variance_epsilon), False, None, site)  # type: ignore[arg-type]
    raise NotNative(f"{path} is a {type(norm).__name__}")


def site_before(layer: nn.Module) -> Site | None:
    """The site in front of a layer that writes to the residual stream."""
    return _site_of(layer)


def site_rule(site: Site, path: str) -> tuple[str, float]:
    """("top_k", entries kept) | ("above", threshold) | ("nonzero", 0).

    Raises:
        NotNative: another rule.
    """
    if isinstance(site, TopKSite):
        return "top_k", site.keep
    if isinstance(site, ThresholdSite):
        return "above", site.threshold
    if isinstance(site, ExactZeroSite):
        return "nonzero", 0
    raise NotNative(f"{path} has a {type(site).__name__}")


def _site_of(module: nn.Module) -> Site | None:
    site = getattr(module, "activation_site", None)
    return site if isinstance(site, Site) else None


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()
