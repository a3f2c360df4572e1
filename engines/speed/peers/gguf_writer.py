"""A Llama bundle as a GGUF file, quantised by the `gguf` package as llama.cpp's own converter does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from core.bundle import Bundle
from engines.speed.peers.peer import LlamaShape

FORMS = ("F16", "BF16", "Q8_0", "Q4_0")


def write_gguf(bundle: Bundle, path: Path, form: str) -> int:
    """Write a plain Llama model; every matrix in `form` (one of FORMS), vectors in float32, no vocabulary but its size.

    Deviates: llama.cpp's own Q4_0 files keep the head in Q6_K; here it is Q4_0 too (its `--pure`), which reads fewer bytes.

    Returns:
        Bytes of weights that one decode step reads: all but the embedding, of which one row is read, unless it is the head too.

    Raises:
        UnsupportedModel: as `LlamaShape.of`.
    """
    import gguf

    shape = LlamaShape.of(bundle, "llama.cpp")
    kind = gguf.GGMLQuantizationType[form]
    writer = gguf.GGUFWriter(path, "llama")
    _write_header(writer, shape, gguf.LlamaFileType[f"MOSTLY_{form}"])
    read = 0
    for name, tensor in gguf_tensors(bundle, shape):
        values = tensor.detach().float().contiguous().numpy()
        stored = kind if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(values, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
        read += 0 if name == "token_embd.weight" and not shape.tied else int(data.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def _write_header(writer: Any, shape: LlamaShape, file_type: int) -> None:
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_tokenizer_model("no_vocab")


def gguf_tensors(bundle: Bundle, shape: LlamaShape) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under GGUF's names, queries and keys in llama.cpp's order of rotary pairs."""
    model: Any = bundle.model
    yield "token_embd.weight", model.model.embed_tokens.weight
    if not shape.tied:
        yield "output.weight", model.lm_head.weight
    yield "output_norm.weight", model.model.norm.weight
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight
        yield f"blk.{i}.attn_q.weight", rotary_pairs_together(attention.q_proj.weight, shape.heads)
        yield f"blk.{i}.attn_k.weight", rotary_pairs_together(attention.k_proj.weight, shape.kv_heads)
        yield f"blk.{i}.attn_v.weight", attention.v_proj.weight
        yield f"blk.{i}.attn_output.weight", attention.o_proj.weight
        yield f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight
        yield f"blk.{i}.ffn_gate.weight", mlp.gate_proj.weight
        yield f"blk.{i}.ffn_up.weight", mlp.up_proj.weight
        yield f"blk.{i}.ffn_down.weight", mlp.down_proj.weight


def rotary_pairs_together(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix [heads * head_dim, hidden], entries i and i + head_dim / 2 of a head side by side.

    Source: `permute` of llama.cpp's convert_hf_to_gguf.py; transformers turns halves, llama.cpp neighbours.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
