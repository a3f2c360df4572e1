"""What the bench asks of a rival, and the Llama architecture that rivals are written for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from core.bundle import Bundle
from core.errors import UnsupportedModel


class Peer(Protocol):
    """A rival runtime that holds one model and one sequence.

    executor: its name and version.
    settings: what it was set to or chose, as plain values, for the record.
    weight_bytes: bytes of weights that one decode step reads, in the form it was given them.
    kv_bytes_per_token: bytes of keys and values of one token of context.
    """

    executor: str
    settings: dict[str, Any]
    weight_bytes: int
    kv_bytes_per_token: int

    def settle(self, ids: Sequence[int], phase: str) -> None:
        """Choose between what the runtime leaves to its user by timing "prefill" of `ids` or "decode" after them."""

    def prefill(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Forget the sequence and read a new one; the last position's logits [vocab_size], float32."""

    def decode(self, token: int) -> np.ndarray[Any, Any]:
        """One decode step: the logits [vocab_size] after `token`, float32, valid until the next call."""

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens of the sequence."""


@dataclass(frozen=True)
class LlamaShape:
    """The numbers that define a plain Llama: rotary positions, RMS norms, SwiGLU, no biases."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    eps: float
    rope_theta: float
    tied: bool

    @classmethod
    def of(cls, bundle: Bundle, peer: str) -> LlamaShape:
        """The shape of a bundle's model.

        Raises:
            UnsupportedModel: another architecture, biases, or scaled rotary positions.
        """
        config: Any = bundle.model.config
        rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", 10000.0)}
        other = [
            *([f"its architecture is {config.model_type}"] if config.model_type != "llama" else []),
            *([f"its rotary positions are of kind {rope['rope_type']}"] if rope.get("rope_type", "default") != "default" else []),
            *(["it has biases"] if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False) else []),
        ]
        if other:
            raise UnsupportedModel(f"{peer} is measured on plain Llama models, and of this one {other[0]}. Choose embedded, smollm2-135m or tinyllama-1.1b.")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        tied = bundle.model.get_input_embeddings().weight.data_ptr() == bundle.model.get_output_embeddings().weight.data_ptr()  # type: ignore[union-attr,operator]
        return cls(
            config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, head_dim,
            config.vocab_size, config.max_position_embeddings, config.rms_norm_eps, float(rope["rope_theta"]), tied,
        )
