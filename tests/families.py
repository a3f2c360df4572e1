"""Tiny random models of every family in the architecture table, from configurations, seeded."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

POSITIONS = 128
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}
_GROUPED = {**_SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
_OPT = {**_SIZES, "ffn_dim": 128}
_MAKERS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen3": (Qwen3Config, {**_GROUPED, "head_dim": 16}),
    "mistral": (MistralConfig, _GROUPED),
    "granite": (GraniteConfig, {**_GROUPED, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "phi": (PhiConfig, {**_GROUPED, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    # 48 is no multiple of the 64 weights that share an nf4 scale.
    "gpt2": (GPT2Config, {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}),
    "gpt_neox": (GPTNeoXConfig, {**_SIZES, "hidden_size": 32, "intermediate_size": 64, "rotary_pct": 0.5, "use_parallel_residual": True}),
    "gpt_neox_sequential": (GPTNeoXConfig, {**_SIZES, "hidden_size": 32, "intermediate_size": 64, "rotary_pct": 0.5, "use_parallel_residual": False}),
    "opt": (OPTConfig, {**_OPT, "word_embed_proj_dim": 64, "do_layer_norm_before": True}),
    "opt_post_norm": (OPTConfig, {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
}
NAMES = tuple(_MAKERS)


def make_config(name: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PretrainedConfig:
    """The tiny configuration of a family; `changes` replace its entries."""
    kind, values = _MAKERS[name]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return kind(**{**values, "vocab_size": len(tokenizer), **ids, **changes})


def make_model(name: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PreTrainedModel:
    """A tiny model of a family in eval mode, the same at each call."""
    model = AutoModelForCausalLM.from_config(make_config(name, tokenizer, **changes)).eval()
    randomise_(model, seed=zlib.crc32(name.encode()))
    return model


@torch.no_grad()
def randomise_(model: nn.Module, seed: int) -> None:
    """Weights large enough to matter, and norms and biases away from their defaults 1 and 0, so that forgetting one shows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor, mean: float, std: float) -> torch.Tensor:
        return mean + std * torch.randn(like.shape, generator=generator)

    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.weight.copy_(normal(module.weight, 1.0, 0.3))
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(normal(module.bias, 0.0, 0.2))
        elif isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            module.weight.copy_(normal(module.weight, 0.0, 0.15))
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(normal(module.bias, 0.0, 0.1))
