"""From torch modules to a program: walks a model of a known family as techniques have left it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from core.architectures import Architecture, architecture_of, family_of
from core.bundle import storage_bytes, tensors_of
from core.errors import UnsupportedModel
from core.memory import last_level_cache_bytes
from engines.native.parts import Linear, Norm, NotNative, linear_part, norm_part, site_before, site_rule
from engines.native.program import (
    ABOVE,
    ACTIVATE,
    ADD_ROW,
    APPEND,
    ATTEND,
    EMBED,
    HEAD_NORM,
    NONZERO,
    ROTATE,
    TOP_K,
    Buffer,
    LoadedProgram,
    Output,
    Product,
    Program,
    Rows,
)
from kernels.kv_memory.layout import KVLayout
from kernels.packing import BLOCK, TILE, PackedWeight, side_by_side
from kernels.structures import GROUP, address, kind_of
from optim.larosa.modules import ResidualAdapter, Site, TokenPosition
from optim.larosa.structure import Structure

_ACTIVATIONS = {"silu": 0, "swish": 0, "relu": 1, "gelu": 2, "gelu_new": 3, "gelu_pytorch_tanh": 3, "gelu_fast": 3}
_MODES = {"top_k": TOP_K, "above": ABOVE, "nonzero": NONZERO}
_FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class Compiled:
    """A program, the cache it needs, and what its weights cost."""

    program: LoadedProgram
    layouts: tuple[KVLayout, ...]
    weights: nn.Module
    sites: tuple[Site, ...]
    """In the order of `program.kept_rows()`."""
    read: Mapping[str, PackedWeight]
    """By a layer's path, the weight that the program reads in its place."""


class Weights(nn.Module):
    """Every tensor that a program reads and no torch module holds."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        for place, tensor in enumerate(tensors):
            self.register_buffer(f"w{place}", tensor, persistent=False)


def compile_program(model: PreTrainedModel, context: int, threads: int) -> Compiled:
    """The decode step of `model` as it is now.

    Raises:
        NotNative: a part has no native counterpart; names it.
    """
    return _Compiler(model, context, threads).compile()


class _Compiler:
    def __init__(self, model: PreTrainedModel, context: int, threads: int) -> None:
        self.model, self.context, self.threads = model, context, threads
        self.config: Any = model.config.get_text_config()
        self.family = family_of(model)
        if self.family == "opt_post_norm":
            raise NotNative("norms that stand behind the residual sums (OPT-350M)")
        try:
            self.architecture: Architecture = architecture_of(model, "The native runtime")
        except UnsupportedModel as error:
            raise NotNative(str(error)) from error
        self.structure = Structure(model, self.architecture)
        _check_modules(model)
        self.heads = int(self.config.num_attention_heads)
        self.key_heads = int(getattr(self.config, "num_key_value_heads", None) or self.heads)
        self.head_dim = int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads)
        self.width = int(self.config.hidden_size)
        self.sites: list[Site] = []
        self.beyond_cache = _weight_bytes(model) > last_level_cache_bytes()
        self.rotated: dict[Buffer, Buffer] = {}
        self.read: dict[str, PackedWeight] = {}

    def compile(self) -> Compiled:
        """The whole program."""
        blocks = self.structure.blocks
        qkv_width = (self.heads + 2 * self.key_heads) * self.head_dim
        middle = max(_out_features(block.get_submodule(name)) for block in blocks for name in self.architecture.mlp_in)
        head = linear_part(self.model.get_output_embeddings(), _path_of_head(self.model))
        self.program = program = Program(max(self.width, qkv_width, middle, self.heads * self.head_dim), len(blocks), head.weight.out_features, self.threads)
        self.stream, self.other = program.shared(self.width), program.shared(self.width)
        self.qkv, self.attended = program.shared(qkv_width), program.shared(self.heads * self.head_dim)
        self.gate, self.up = program.shared(middle), program.shared(middle)
        self.sums = program.sums(_whole_tiles(max(qkv_width + 3 * TILE, 2 * (middle + TILE), self.width)))
        self.normed, self.normed_too = program.own(self.width), program.own(self.width)
        self._embed()
        self.rope = self._rope_tables()
        for index, block in enumerate(blocks):
            self._block(index, block)
        self._head(head)
        kept = {id(t): t for item in program.keep for t in _tensors(item)}
        known = {t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        layout = KVLayout(self.key_heads, self.key_heads, self.head_dim, self._dtype())
        loaded = program.finish(GROUP * self.context)
        return Compiled(loaded, (layout,) * len(blocks), Weights([t for t in kept.values() if t.data_ptr() not in known]), tuple(self.sites), self.read)

    def _dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype  # type: ignore[union-attr,return-value]

    def _embed(self) -> None:
        table: Any = self.model.get_input_embeddings()
        if type(table) is not nn.Embedding or table.weight.dtype not in (torch.float32, torch.bfloat16):
            raise NotNative(f"the embedding is a {type(table).__name__} in {table.weight.dtype}")
        if table.weight.shape[1] != self.width:
            raise NotNative("embeddings are projected to another width")
        factor = float(getattr(self.structure.decoder, "embedding_multiplier", 1.0))
        everyone = [(self.stream, "entries")]
        operation = self.program.emit(EMBED, writes=everyone, keep=(table.weight,), to=self.stream.operand, n=self.width, mode=kind_of(table.weight.dtype), table=address(table.weight))
        operation.factor = factor
        if self.architecture.position_embedding is not None:
            positions: Any = self.model.get_submodule(self.architecture.position_embedding)
            self.program.emit(ADD_ROW, reads=everyone, writes=everyone, keep=(positions.weight,), to=self.stream.operand, n=self.width, mode=kind_of(positions.weight.dtype),
                              table=address(positions.weight), offset=int(getattr(positions, "offset", 0)))

    def _rope_tables(self) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [context, turned / 2]; None without rotary positions."""
        rotary: Any = getattr(self.structure.decoder, "rotary_emb", None)
        if rotary is None:
            return None
        if getattr(rotary, "rope_type", "default") not in _FIXED_ROPE:
            raise NotNative(f"rotary positions of type {rotary.rope_type} depend on the text's length")
        positions = torch.arange(self.context, device=rotary.inv_freq.device)[None]
        cosine, sine = rotary(torch.zeros(1, dtype=torch.float32), positions)
        half = cosine.shape[-1] // 2
        return cosine[0, :, :half].float().contiguous(), sine[0, :, :half].float().contiguous()

    def _block(self, index: int, block: nn.Module) -> None:
        adapter = getattr(block, "residual_adapter", None)
        if isinstance(adapter, ResidualAdapter):
            self._change_basis(adapter)
        a = self.architecture
        scale = float(getattr(block, "residual_multiplier", 1.0))
        first, first_rows = self._norm(block, a.attention_norm, self.normed, index)
        parallel = a.norm_placement == "parallel"
        second, second_rows = first, first_rows
        if parallel and a.mlp_norm != a.attention_norm:
            second, second_rows = self._norm(block, a.mlp_norm, self.normed_too, index)
        self._attention(index, block, first, first_rows)
        if not parallel:
            self._write(block, index, a.output, self.attended, self.heads * self.head_dim, scale)
            second, second_rows = self._norm(block, a.mlp_norm, self.normed, index)
        self._mlp(index, block, second, second_rows)
        if parallel:
            self._write(block, index, a.output, self.attended, self.heads * self.head_dim, scale)
        self._write(block, index, a.mlp_out, self.gate, _in_features(block.get_submodule(a.mlp_out)), scale)

    def _change_basis(self, adapter: ResidualAdapter) -> None:
        self._product(linear_part(adapter.linear, "a residual adapter"), self.stream, self.other)
        self.stream, self.other = self.other, self.stream

    def _product(self, weight: Linear, source: Buffer, to: Buffer) -> None:
        self.program.multiply([Product(weight.weight, weight.bias, source, to)])

    def _norm(self, block: nn.Module, name: str, to: Buffer, index: int) -> tuple[Buffer, Rows | None]:
        path = self.structure.path(index, name)
        part = norm_part(block.get_submodule(name), path)
        source = self._normalise(part, to, path)
        return source, self._rows(part.site, source, self.width, path)

    def _normalise(self, part: Norm, to: Buffer, path: str) -> Buffer:
        self.program.norm(self.stream, to, self.width, part.gain, part.shift, part.eps, part.centre)
        if part.rotation is None:
            return to
        rotated = self.rotated.setdefault(to, self.program.shared(self.width))
        self._product(_matrix(part.rotation.T, path), to, rotated)
        return rotated

    def _part(self, block: nn.Module, index: int, name: str) -> Linear:
        return linear_part(block.get_submodule(name), self.structure.path(index, name))

    def _multiply(self, parts: Sequence[Linear], source: Buffer, rows: Rows | None, to: Sequence[Buffer], heads: Sequence[int], *, add: bool = False, factor: float = 1.0) -> None:
        """Layers over the same input; threads share out the input channels where that reads longer pieces or divides more evenly.

        heads: pieces in which each output is read next, 0 for any.
        """
        if rows is not None and self.beyond_cache:
            weight = side_by_side([p.weight for p in parts])
        elif len(parts) == 1 and rows is None and _is_uneven(parts[0].weight.out_features, self.threads):
            weight = parts[0].weight
        else:
            self.program.multiply([Product(p.weight, p.bias, source, at, rows, add, factor) for p, at in zip(parts, to, strict=True)])
            self.read.update({p.path: p.weight for p in parts})
            return
        outputs, start = [], 0
        for part, at, pieces in zip(parts, to, heads, strict=True):
            scale = part.weight.scale if part.weight.kind == "int8" else None
            self.read[part.path] = weight.part(start, part.weight.out_features) if weight.by_row else weight
            outputs.append(Output(at, part.weight.out_features, start, scale, part.bias, pieces, add, factor))
            start += _whole_tiles(part.weight.out_features)
        self.program.multiply_in_parts(weight, source, rows, self.sums, outputs)

    def _rows(self, site: Site | None, source: Buffer, size: int, path: str) -> Rows | None:
        """Which channels are read; None for all."""
        if site is None:
            return None
        rule, value = site_rule(site, path)
        if rule == "top_k" and value >= size:
            return None
        self.sites.append(site)
        return self.program.select(source, size, _MODES[rule], keep=int(value) if rule == "top_k" else 0, threshold=float(value), exempt=site.exempt if rule != "nonzero" else 0)

    def _attention(self, index: int, block: nn.Module, source: Buffer, rows: Rows | None) -> None:
        a, program = self.architecture, self.program
        attention: Any = block.get_submodule(a.attention)
        by_head = a.fused_by_head  # q, k and v of one head stand side by side
        spread = 3 * self.head_dim if by_head else self.head_dim
        starts = [0, self.head_dim, 2 * self.head_dim] if by_head else [0, self.heads * self.head_dim, (self.heads + self.key_heads) * self.head_dim]
        if a.fused:
            self._multiply([self._part(block, index, a.qkv[0])], source, rows, [self.qkv], [0])
            program.written(*(self.qkv + start for start in starts))
        else:
            parts = [self._part(block, index, name) for name in a.qkv]
            self._multiply(parts, source, rows, [self.qkv + start for start in starts], [self.heads, self.key_heads, self.key_heads])
        q, k, v = (self.qkv + start for start in starts)
        for buffer, heads, norm in ((q, self.heads, "q_norm"), (k, self.key_heads, "k_norm")):
            how = [(buffer, ("heads", heads))]
            normed: Any = getattr(attention, norm, None) if norm in dict(attention.named_children()) else getattr(attention, norm.replace("_norm", "_layernorm"), None)
            if isinstance(normed, nn.Module):
                part_ = norm_part(normed, f"{self.structure.path(index, a.attention)}.{norm}")
                program.emit(HEAD_NORM, reads=how, writes=how, keep=(part_.gain, part_.shift), from_=buffer.operand, heads=heads, head_stride=spread,
                             dim=self.head_dim, gain=address(part_.gain), shift=address(part_.shift), eps=part_.eps, add=part_.centre)
            if self.rope is not None:
                cosine, sine = self.rope
                operation = program.emit(ROTATE, reads=how, writes=how, keep=self.rope, from_=buffer.operand, heads=heads, head_stride=spread,
                                         dim=self.head_dim, table=address(cosine), gain=address(sine))
                operation.keep = 2 * cosine.shape[1]
        for mode, buffer in enumerate((k, v)):
            split = ("heads", self.key_heads)
            program.emit(APPEND, reads=[(buffer, split)], writes=[(("kv", index), split)], from_=buffer.operand, heads=self.key_heads, head_stride=spread, layer=index, mode=mode)
        operation = program.emit(ATTEND, reads=[(q, ("heads", self.heads)), (("kv", index), None)], writes=[(self.attended, ("heads", self.heads))], from_=q.operand,
                                 to=self.attended.operand, heads=self.heads, head_stride=spread, layer=index, window=self._window(index))
        operation.factor = float(attention.scaling)

    def _window(self, index: int) -> int:
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        sliding = kinds[index] == "sliding_attention" if kinds else self.family == "mistral"
        return int(window) if window and sliding else 0

    def _mlp(self, index: int, block: nn.Module, source: Buffer, rows: Rows | None) -> None:
        a, program = self.architecture, self.program
        kind = self.structure.activation
        if kind not in _ACTIVATIONS:
            raise NotNative(f"the activation {kind}")
        gate_module = block.get_submodule(self.structure.gate) if self.structure.gate else None
        if gate_module is not None and isinstance(getattr(gate_module, "activation_site", None), Site):
            raise NotNative("activations dropped behind the gate (CATS)")
        parts = [self._part(block, index, name) for name in a.mlp_in]
        self._multiply(parts, source, rows, [self.gate, self.up][: len(parts)], [0] * len(parts))
        gated = len(parts) == 2
        program.emit(ACTIVATE, reads=[(self.gate, "entries"), *([(self.up, "entries")] if gated else [])], writes=[(self.gate, "entries")], from_=self.gate.operand, to=self.gate.operand,
                     gated=self.up.operand if gated else 0, n=parts[0].weight.out_features, mode=_ACTIVATIONS[kind])

    def _write(self, block: nn.Module, index: int, name: str, source: Buffer, size: int, factor: float) -> None:
        layer, path = block.get_submodule(name), self.structure.path(index, name)
        rows = self._rows(site_before(layer), source, size, path)
        self._multiply([self._part(block, index, name)], source, rows, [self.stream], [0], add=True, factor=factor)

    def _head(self, head: Linear) -> None:
        source = self.stream
        if self.architecture.final_norm is not None:
            norm = getattr(self.structure.decoder, self.architecture.final_norm.rpartition(".")[2], None)
            if norm is not None:
                source = self._normalise(norm_part(norm, "the final norm"), self.normed, "the final norm")
        self.read[head.path] = head.weight
        factor = 1.0 / float(getattr(self.config, "logits_scaling", 1.0) or 1.0)
        self.program.multiply([Product(head.weight, head.bias, source, self.program.logits, factor=factor)])


def _path_of_head(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), "the output head")


def _whole_tiles(size: int) -> int:
    return -(-size // TILE) * TILE


def _is_uneven(outputs: int, threads: int) -> bool:
    """Whether the thread with the most blocks of outputs works over 4 % longer than the mean."""
    blocks = -(-outputs // BLOCK)
    return -(-blocks // threads) > 1.04 * blocks / threads


def _weight_bytes(model: nn.Module) -> int:
    return sum(storage_bytes(tensors_of([model])).values())


def _matrix(weight: Tensor, path: str) -> Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear_part(layer, path)


def _tensors(item: Any) -> list[Tensor]:
    return [item] if isinstance(item, Tensor) else [t for t in (item.data, item.scale) if t is not None]


def _out_features(layer: nn.Module) -> int:
    return int(getattr(layer, "out_features", 0) or layer.nf)  # type: ignore[arg-type]


def _in_features(layer: nn.Module) -> int:
    return int(getattr(layer, "in_features", 0) or layer.nx)  # type: ignore[arg-type]


def _check_modules(model: PreTrainedModel) -> None:
    """Refuse what C would silently leave out: strange hooks, other devices.

    Raises:
        NotNative: names it.
    """
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise NotNative("weights that are not on the CPU")
    for path, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not isinstance(getattr(hook, "__self__", None), (Site, ResidualAdapter, TokenPosition)):
                raise NotNative(f"{path or 'the model'} has a hook that the native runtime does not know")
