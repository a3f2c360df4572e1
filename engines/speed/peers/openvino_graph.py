"""A plain Llama as an OpenVINO model with its cache inside (stateful) and int8 weights, in the patterns that OpenVINO's CPU plugin fuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from core.bundle import Bundle
from engines.speed.peers.peer import LlamaShape

FORMS = ("int8", "float32")
_END = 2**31 - 1


class LlamaGraph:
    """Builds the graph; what optimum-intel exports and NNCF compresses, without either.

    int8: symmetric, one scale for each output channel (NNCF's INT8_SYM), the embedding and the head too; multiplied out
    by the plugin while it reads them.
    """

    def __init__(self, bundle: Bundle, form: str) -> None:
        import openvino
        from openvino import opset13

        self._api, self.op = openvino, opset13
        self.shape = LlamaShape.of(bundle, "openvino")
        self._model: Any = bundle.model
        self._form = form
        self._sinks: list[Any] = []
        self.weight_bytes = 0
        """Bytes of weights that one decode step reads."""

    def build(self) -> Any:
        """`openvino.Model`: input_ids and position_ids [1, S] int64, beam_idx [1] int32 -> logits [1, 1, vocab_size] of the last position."""
        op, model = self.op, self._model.model
        ids = op.parameter([-1, -1], np.int64, name="input_ids")
        positions = op.parameter([-1, -1], np.int64, name="position_ids")
        beam = op.parameter([-1], np.int32, name="beam_idx")
        for node, name in ((ids, "input_ids"), (positions, "position_ids"), (beam, "beam_idx")):
            node.output(0).get_tensor().set_names({name})
        table = self._matrix(model.embed_tokens.weight, counted=self.shape.tied)
        hidden = op.gather(table, ids, self._ints(0))
        rotary = self._rotary(positions)
        mask = self._mask(positions)
        for i, layer in enumerate(model.layers):
            attention = self._attention(i, layer.self_attn, self._norm(hidden, layer.input_layernorm), rotary, mask, beam)
            hidden = op.add(hidden, attention)
            hidden = op.add(hidden, self._mlp(layer.mlp, self._norm(hidden, layer.post_attention_layernorm)))
        last = op.slice(hidden, self._ints([-1]), self._ints([_END]), self._ints([1]), self._ints([1]))
        head = table if self.shape.tied else self._matrix(self._model.lm_head.weight)
        logits = op.matmul(self._norm(last, model.norm), head, False, True)
        logits.output(0).get_tensor().set_names({"logits"})
        return self._api.Model([op.result(logits)], self._sinks, [ids, positions, beam], "llama")

    def _ints(self, values: Any) -> Any:
        return self.op.constant(np.array(values, dtype=np.int64))

    def _floats(self, values: Any) -> Any:
        return self.op.constant(np.array(values, dtype=np.float32))

    def _matrix(self, weight: Tensor, counted: bool = True) -> Any:
        """A weight [outputs, inputs] as float32 values, stored as the form says."""
        op, values = self.op, weight.detach().float()
        if self._form == "float32":
            self.weight_bytes += values.nbytes if counted else 0
            return op.constant(values.numpy())
        scale = (values.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
        scale = scale.half().float().clamp_min(6e-8)
        codes = (values / scale).round_().clamp_(-127, 127).char()
        self.weight_bytes += codes.nbytes + 2 * scale.numel() if counted else 0
        scaled = op.multiply(op.convert(op.constant(codes.numpy()), "f16"), op.constant(scale.half().numpy()))
        return op.convert(scaled, "f32")

    def _linear(self, x: Any, layer: Any) -> Any:
        return self.op.matmul(x, self._matrix(layer.weight), False, True)

    def _norm(self, x: Any, norm: Any) -> Any:
        op = self.op
        mean = op.reduce_mean(op.power(x, self._floats([[[2.0]]])), self._ints([-1]), keep_dims=True)
        root = op.sqrt(op.add(mean, self._floats([[[self.shape.eps]]])))
        scaled = op.multiply(x, op.divide(self._floats([[[1.0]]]), root))
        return op.multiply(op.constant(norm.weight.detach().float().numpy().reshape(1, 1, -1)), scaled)

    def _mlp(self, mlp: Any, x: Any) -> Any:
        op = self.op
        return self._linear(op.multiply(op.swish(self._linear(x, mlp.gate_proj)), self._linear(x, mlp.up_proj)), mlp.down_proj)

    def _rotary(self, positions: Any) -> tuple[Any, Any]:
        """Cosines and sines [1, 1, S, head_dim]."""
        op, dim = self.op, self.shape.head_dim
        inverse = (1.0 / self.shape.rope_theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)
        angles = op.multiply(op.unsqueeze(op.convert(positions, "f32"), self._ints(-1)), op.constant(inverse.reshape(1, 1, -1)))
        both = op.concat([angles, angles], -1)
        return op.unsqueeze(op.cos(both), self._ints(1)), op.unsqueeze(op.sin(both), self._ints(1))

    def _mask(self, positions: Any) -> Any:
        """[1, 1, S, tokens]: 0 where a position may look, -inf ahead of it."""
        op = self.op
        end = op.add(op.reduce_max(positions, self._ints([0, 1]), keep_dims=False), self._ints(1))
        keys = op.unsqueeze(op.range(self._ints(0), end, self._ints(1), "i64"), self._ints([0, 1, 2]))
        ahead = op.greater(keys, op.unsqueeze(op.unsqueeze(positions, self._ints(1)), self._ints(-1)))
        return op.select(ahead, self._floats(np.finfo(np.float32).min), self._floats(0.0))

    def _heads(self, x: Any, heads: int) -> Any:
        shaped = self.op.reshape(x, self._ints([0, 0, heads, self.shape.head_dim]), True)
        return self.op.transpose(shaped, self._ints([0, 2, 1, 3]))

    def _turn(self, x: Any, rotary: tuple[Any, Any]) -> Any:
        op, half = self.op, self.shape.head_dim // 2
        first, second = (op.slice(x, self._ints([start]), self._ints([stop]), self._ints([1]), self._ints([3])) for start, stop in ((0, half), (half, _END)))
        turned = op.concat([op.multiply(second, self._floats([[[[-1.0]]]])), first], -1)
        return op.add(op.multiply(x, rotary[0]), op.multiply(turned, rotary[1]))

    def _attention(self, layer: int, attention: Any, x: Any, rotary: tuple[Any, Any], mask: Any, beam: Any) -> Any:
        op, shape = self.op, self.shape
        queries = self._turn(self._heads(self._linear(x, attention.q_proj), shape.heads), rotary)
        keys = self._turn(self._heads(self._linear(x, attention.k_proj), shape.kv_heads), rotary)
        values = self._heads(self._linear(x, attention.v_proj), shape.kv_heads)
        keys, values = (self._cached(f"{name}.{layer}", new, beam) for name, new in (("keys", keys), ("values", values)))
        scale = self._floats(shape.head_dim**-0.5)
        mixed = op.scaled_dot_product_attention(queries, self._repeated(keys), self._repeated(values), mask, scale)
        joined = op.reshape(op.transpose(mixed, self._ints([0, 2, 1, 3])), self._ints([0, 0, shape.heads * shape.head_dim]), True)
        return self._linear(joined, attention.o_proj)

    def _cached(self, name: str, new: Any, beam: Any) -> Any:
        """Everything read so far with `new` at its end, kept as a state."""
        op, shape = self.op, self.shape
        empty = op.broadcast(self._floats(0.0), op.concat([op.shape_of(beam), self._ints([shape.kv_heads, 0, shape.head_dim])], 0))
        past = op.read_value(empty, name, self._api.Type.f32, self._api.PartialShape([-1, shape.kv_heads, -1, shape.head_dim]))
        everything = op.concat([op.gather(past, beam, self._ints(0)), new], 2)
        self._sinks.append(op.assign(everything, name))
        return everything

    def _repeated(self, x: Any) -> Any:
        """Keys or values of fewer heads, each for its group of query heads."""
        op, shape = self.op, self.shape
        groups = shape.heads // shape.kv_heads
        if groups == 1:
            return x
        size = op.shape_of(x)
        parts: Sequence[Any] = [op.gather(size, self._ints([i]), self._ints(0)) for i in range(4)]
        target = op.concat([parts[0], parts[1], self._ints([groups]), parts[2], parts[3]], 0)
        wide = op.broadcast(op.unsqueeze(x, self._ints(2)), target, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(wide, self._ints([0, shape.heads, -1, shape.head_dim]), True)
