"""Model families as data: where each keeps the parts that techniques work on, and what its structure admits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from core.errors import UnsupportedModel


@dataclass(frozen=True)
class Architecture:
    """One family. Module names are relative to a decoder block unless they start at the model's root.

    norm_placement: "pre" | "post" | "parallel" (attention and MLP read the same residual).
    fused: module name -> the projections it holds, in order: all of one after all of the other, or head by head when `fused_by_head`.
    conv1d: linear layers are transformers' Conv1D, weight stored [in, out].
    """

    model_type: str
    blocks: str
    attention: str
    qkv: tuple[str, ...]
    output: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    attention_norm: str
    mlp_norm: str
    final_norm: str | None
    embedding: str
    position_embedding: str | None = None
    head: str = "lm_head"
    norm_placement: str = "pre"
    conv1d: bool = False
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fused_by_head: bool = False

    def block_list(self, model: nn.Module) -> nn.ModuleList:
        """The decoder blocks of a model of this family."""
        found = model.get_submodule(self.blocks)
        assert isinstance(found, nn.ModuleList)
        return found

    def projections(self, model: nn.Module) -> dict[str, nn.Module]:
        """Every projection inside the decoder blocks, by dotted path from the model's root, in forward order."""
        names = dict.fromkeys((*self.qkv, self.output, *self.mlp_in, self.mlp_out))
        return {
            f"{self.blocks}.{i}.{name}": block.get_submodule(name)
            for i, block in enumerate(self.block_list(model))
            for name in names
        }


def _llama_like(model_type: str) -> Architecture:
    return Architecture(
        model_type=model_type, blocks="model.layers", attention="self_attn",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), output="self_attn.o_proj",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"), mlp_out="mlp.down_proj",
        attention_norm="input_layernorm", mlp_norm="post_attention_layernorm", final_norm="model.norm",
        embedding="model.embed_tokens",
    )


def _opt(norm_placement: str) -> Architecture:
    return Architecture(
        model_type="opt", blocks="model.decoder.layers", attention="self_attn",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), output="self_attn.out_proj",
        mlp_in=("fc1",), mlp_out="fc2", attention_norm="self_attn_layer_norm", mlp_norm="final_layer_norm",
        final_norm="model.decoder.final_layer_norm" if norm_placement == "pre" else None,
        embedding="model.decoder.embed_tokens", position_embedding="model.decoder.embed_positions",
        norm_placement=norm_placement,
    )


_PHI = Architecture(
    model_type="phi", blocks="model.layers", attention="self_attn",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), output="self_attn.dense",
    mlp_in=("mlp.fc1",), mlp_out="mlp.fc2", attention_norm="input_layernorm", mlp_norm="input_layernorm",
    final_norm="model.final_layernorm", embedding="model.embed_tokens", norm_placement="parallel",
)
_GPT2 = Architecture(
    model_type="gpt2", blocks="transformer.h", attention="attn", qkv=("attn.c_attn",), output="attn.c_proj",
    mlp_in=("mlp.c_fc",), mlp_out="mlp.c_proj", attention_norm="ln_1", mlp_norm="ln_2", final_norm="transformer.ln_f",
    embedding="transformer.wte", position_embedding="transformer.wpe", conv1d=True, fused={"attn.c_attn": ("q", "k", "v")},
)
_GPT_NEOX = Architecture(
    model_type="gpt_neox", blocks="gpt_neox.layers", attention="attention", qkv=("attention.query_key_value",),
    output="attention.dense", mlp_in=("mlp.dense_h_to_4h",), mlp_out="mlp.dense_4h_to_h", attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm", final_norm="gpt_neox.final_layer_norm", embedding="gpt_neox.embed_in",
    norm_placement="parallel", fused={"attention.query_key_value": ("q", "k", "v")}, fused_by_head=True,
)

FAMILIES: dict[str, Architecture] = {
    **{name: _llama_like(name) for name in ("llama", "qwen2", "qwen3", "mistral", "granite")},
    "phi": _PHI, "gpt2": _GPT2, "gpt_neox": _GPT_NEOX, "gpt_neox_sequential": replace(_GPT_NEOX, norm_placement="pre"), "opt": _opt("pre"), "opt_post_norm": _opt("post"),
}
"""SmolLM checkpoints are of model type llama."""


def family_of(model: nn.Module) -> str:
    """The family's name in `FAMILIES`, or the model type when it is not listed."""
    config = model.config  # type: ignore[union-attr]
    name = str(getattr(config, "model_type", type(model).__name__))
    if name == "opt" and not config.do_layer_norm_before:  # type: ignore[union-attr]
        return "opt_post_norm"
    if name == "gpt_neox" and not config.use_parallel_residual:  # type: ignore[union-attr]
        return "gpt_neox_sequential"
    return name


REFUSED: dict[tuple[str, str], str] = {
    ("opt_post_norm", "larosa"): "its norms stand behind the residual sums, so no rotation commutes with them",
}
"""(family, technique) -> why the technique cannot be applied to the family. What is not listed is admitted."""


def refusal(model: nn.Module, technique: str) -> str | None:
    """Why `technique` refuses the model's family, None when it admits it."""
    return REFUSED.get((family_of(model), technique))


def architecture_of(model: nn.Module, technique: str) -> Architecture:
    """The table's row for `model`.

    Raises:
        UnsupportedModel: the family is not in the table, or the model is built otherwise than its family; names the technique
            that asked.
    """
    family = family_of(model)
    if family not in FAMILIES:
        raise UnsupportedModel(
            f"{technique} does not know the model family {family!r}. It admits {', '.join(sorted(FAMILIES))}. "
            "The baseline and prompt techniques run on any causal language model."
        )
    row = FAMILIES[family]
    try:
        row.projections(model)
    except AttributeError as error:
        raise UnsupportedModel(f"{technique} cannot work on this model: it says that it is of the family {family!r}, but {error}.") from error
    return row
