"""Models to time: the embedded one, and well-known shapes with random weights, on which speed does not depend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PhiConfig, PretrainedConfig

from core.bundle import Bundle, ModelInfo
from core.errors import InvalidRequest
from core.loading import load_bundle
from core.technique import Prepared, Technique
from optim.larosa.technique import LaRoSA

EMBEDDED = "embedded"
_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "smollm2-135m": (LlamaConfig, {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                                   "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192}),
    "gpt2": (GPT2Config, {}),
    "opt-125m": (OPTConfig, {}),
    "tinyllama-1.1b": (LlamaConfig, {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
                                     "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False}),
    "phi-2": (PhiConfig, {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 51200,
                          "partial_rotary_factor": 0.4, "max_position_embeddings": 2048}),
}
SHAPES = (EMBEDDED, *_CONFIGS)
RELU_ZEROS = 0.9
"""Share of a ReLU model's hidden units that are zero for a token: what trained OPT models have at least, set because random weights have half."""


def load_shape(name: str, dtype: str) -> Bundle:
    """A shape as a bundle.

    Raises:
        InvalidRequest: unknown name; lists what there is.
    """
    if name == EMBEDDED:
        return load_bundle(EMBEDDED, dtype=dtype)
    if name not in _CONFIGS:
        raise InvalidRequest(f"There is no shape {name[:40]!r}; there are {', '.join(SHAPES)}.")
    kind, values = _CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**values), dtype=getattr(torch, dtype)).eval()
    if kind is OPTConfig:
        set_relu_zeros(model, RELU_ZEROS)
    tokenizer = load_bundle(EMBEDDED).tokenizer
    return Bundle(model, tokenizer, ModelInfo(f"{name} with random weights", None, dtype, "local"))


@torch.inference_mode()
def set_relu_zeros(model: Any, share: float) -> None:
    """Lower the biases before every ReLU of an OPT model so that this share of the units is zero on random tokens."""

    def lower(layer: nn.Linear, _: Any, before: torch.Tensor) -> torch.Tensor:
        shift = before.float().flatten().quantile(share).to(before.dtype)
        assert layer.bias is not None
        layer.bias.sub_(shift)
        return before - shift

    hooks = [layer.fc1.register_forward_hook(lower) for layer in model.model.decoder.layers]
    model(torch.randint(10, model.config.vocab_size, (1, 128), generator=torch.Generator().manual_seed(0)))
    for hook in hooks:
        hook.remove()


def relu_zeros(model: Any, ids: Sequence[int]) -> float | None:
    """The share of an OPT model's hidden units that are zero on a text; None for models without ReLU."""
    if not isinstance(model.config, OPTConfig):
        return None
    zeros: list[float] = []
    hooks = [layer.fc1.register_forward_hook(lambda _layer, _in, out: zeros.append(float((out <= 0).float().mean()))) for layer in model.model.decoder.layers]
    with torch.inference_mode():
        model(torch.tensor([list(ids)]))
    for hook in hooks:
        hook.remove()
    return sum(zeros) / len(zeros)


def prepared_without_calibration(technique: Technique, bundle: Bundle) -> Prepared:
    """What stands in for calibration where weights are random: rotations that turn nothing, the same share for every site.

    The work a step does is the same; only the quality, which random weights do not have, would differ.
    """
    if not isinstance(technique, LaRoSA):
        return technique.prepare(bundle)
    config = bundle.model.config.get_text_config()
    identity = torch.eye(config.hidden_size)
    kinds = ("attention", "output", "mlp", "down")
    return Prepared({f"rotation.{i}": identity for i in range(config.num_hidden_layers)}, {"multipliers": json.dumps(dict.fromkeys(kinds, 1.0))})


def apply_methods(base: Bundle, techniques: Sequence[Technique]) -> Bundle:
    """A copy of `base` with techniques applied, uncalibrated ones on random weights."""
    bundle = base.clone()
    for technique in techniques:
        technique.check(bundle)
        technique.apply(bundle, prepared_without_calibration(technique, bundle))
    return bundle
