"""bitsandbytes layers made from a model's own linear layers, without touching the original weights."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from core.linear_layers import linear_weight

# At import it reports that an optional kernel of the hub is missing; ours never comes from there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Each int8 forward would warn that inputs pass through fp16; the technique's docstring says so once.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

import bitsandbytes as bnb  # noqa: E402


def int8_linear(layer: nn.Module, threshold: float) -> nn.Module:
    """LLM.int8() layer: weights int8 per output channel, activations int8 per token, outlier columns in full."""
    weight, bias = linear_weight(layer)
    new = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=bias is not None, has_fp16_weights=False, threshold=threshold, device="meta")
    packed, scale, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    new.weight = bnb.nn.Int8Params(packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=scale)
    new.state.CB, new.state.SCB = packed, scale
    _set_bias(new, bias)
    return new.eval()


def nf4_linear(layer: nn.Module, block_size: int, double_quant: bool) -> nn.Module:
    """NormalFloat4 layer: blocks of weights as 4-bit codes with one scale each."""
    weight, bias = linear_weight(layer)
    dtype = weight.dtype
    new = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=bias is not None, quant_type="nf4", compute_dtype=dtype, device="meta")
    packed, state = bnb.functional.quantize_4bit(weight.contiguous(), blocksize=block_size, compress_statistics=double_quant, quant_type="nf4")
    new.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, blocksize=block_size,
                                   compress_statistics=double_quant, quant_type="nf4", bnb_quantized=True, module=new)
    new.quant_state = state
    # The fused kernel keeps scales in bf16; asked for 8-bit scales, keep those and unpack at each call.
    new.support_avx512bf16_for_cpu = fused_nf4_runs(new, block_size) and not double_quant
    _set_bias(new, bias)
    new.eval()
    with torch.inference_mode():  # the fused kernel repacks at its first call; do it here, so that bytes are final
        new(torch.zeros(1, weight.shape[1], dtype=dtype, device=weight.device))
    new.register_state_dict_pre_hook(_flatten_scales)
    return new


def _flatten_scales(layer: Any, prefix: str, keep_vars: bool) -> None:
    """For `state_dict()` bitsandbytes turns fused codes back but not their scales, which then belong to other weights."""
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False) and not state.original_nested:
        state.absmax = state.absmax.T.reshape(-1).float()


def fused_nf4_runs(layer: Any, block_size: int) -> bool:
    """Whether bitsandbytes computes with the 4-bit codes on this CPU; else it unpacks the layer at each call."""
    out_features, in_features = layer.out_features, layer.in_features
    return bool(bnb.functional.has_avx512bf16()) and out_features % 32 == 0 and in_features % block_size == 0


def _set_bias(layer: Any, bias: Tensor | None) -> None:
    layer.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
