"""Models to time: the embedded one, and well-known shapes with random weights, on which speed does not depend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
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
    tokenizer = load_bundle(EMBEDDED).tokenizer
    return Bundle(model, tokenizer, ModelInfo(f"{name} with random weights", None, dtype, "local"))


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
