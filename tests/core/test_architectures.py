"""The architecture table against real (tiny) models of each family: paths, order, placement of norms, fused projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from core.architectures import FAMILIES, Architecture, architecture_of, family_of
from core.bundle import Bundle
from core.errors import UnsupportedModel
from tests import families

BundleOf = Callable[[str], Bundle]
IDS = torch.tensor([[5, 17, 40, 9, 22, 60]])
on_every_family = pytest.mark.parametrize("family", sorted(FAMILIES))


def test_tiny_models_exist_for_the_whole_table() -> None:
    assert set(families.NAMES) == set(FAMILIES)


@on_every_family
def test_family_of_a_model_finds_its_row(family: str, family_bundle: BundleOf) -> None:
    model = family_bundle(family).model
    assert family_of(model) == family
    assert architecture_of(model, "test") is FAMILIES[family]
    assert FAMILIES[family].model_type == model.config.model_type


@on_every_family
@pytest.mark.parametrize("part", ["blocks", "embedding", "position_embedding", "final_norm", "head"])
def test_parts_at_the_models_root_are_where_the_table_says(family: str, part: str, family_bundle: BundleOf) -> None:
    model, row = family_bundle(family).model, FAMILIES[family]
    path = getattr(row, part)
    if path is None:
        return
    found = model.get_submodule(path)
    if part == "embedding":
        assert found is model.get_input_embeddings()
    elif part == "head":
        assert found is model.get_output_embeddings()
    elif part == "blocks":
        assert len(row.block_list(model)) == model.config.num_hidden_layers
    elif part == "position_embedding":
        assert found.weight.shape[0] >= families.POSITIONS
    else:
        assert "Norm" in type(found).__name__


@on_every_family
def test_only_families_with_learned_positions_name_them(family: str, family_bundle: BundleOf) -> None:
    model, row = family_bundle(family).model, FAMILIES[family]
    tables = [path for path, module in model.named_modules() if isinstance(module, nn.Embedding)]
    assert sorted(tables) == sorted(filter(None, (row.embedding, row.position_embedding)))


@on_every_family
def test_parts_of_a_block_are_where_the_table_says(family: str, family_bundle: BundleOf) -> None:
    model, row = family_bundle(family).model, FAMILIES[family]
    for block in row.block_list(model):
        attention = block.get_submodule(row.attention)
        assert "Attention" in type(attention).__name__
        for name in (*row.qkv, row.output):
            assert name.startswith(row.attention + "."), f"{name} is not inside {row.attention}"
        for name in (row.attention_norm, row.mlp_norm):
            assert "Norm" in type(block.get_submodule(name)).__name__


@on_every_family
def test_projections_are_all_linear_layers_of_the_blocks(family: str, family_bundle: BundleOf) -> None:
    model, row = family_bundle(family).model, FAMILIES[family]
    found = row.projections(model)
    linear = {path: m for path, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and path.startswith(row.blocks + ".")}
    assert found == linear
    assert all(isinstance(m, Conv1D) == row.conv1d for m in found.values())


@on_every_family
def test_projections_come_in_forward_order(family: str, family_bundle: BundleOf) -> None:
    model, row = family_bundle(family).model, FAMILIES[family]
    called: list[str] = []
    for path, module in row.projections(model).items():
        module.register_forward_pre_hook(lambda module, args, path=path: called.append(path))
    with torch.inference_mode():
        model(input_ids=IDS)
    assert called == list(row.projections(model))


def inputs_of(model: nn.Module, paths: dict[str, str]) -> dict[str, Tensor]:
    """First positional or keyword input of each named module in one forward."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(name, args[0] if args else kwargs["hidden_states"])

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(keep(name), with_kwargs=True) for name, path in paths.items()]
    with torch.inference_mode():
        model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return seen


def measured_placement(model: nn.Module, row: Architecture) -> str:
    """Where the norms really are: from what the block's parts are fed."""
    block = f"{row.blocks}.1"
    seen = inputs_of(model, {
        "block": block, "qkv": f"{block}.{row.qkv[0]}", "attention_norm": f"{block}.{row.attention_norm}",
        "mlp_norm": f"{block}.{row.mlp_norm}",
    })
    if torch.equal(seen["qkv"], seen["block"]):
        return "post"
    assert torch.equal(seen["attention_norm"], seen["block"])
    return "parallel" if torch.equal(seen["mlp_norm"], seen["block"]) else "pre"


@on_every_family
def test_norms_are_placed_as_the_table_says(family: str, family_bundle: BundleOf) -> None:
    assert measured_placement(family_bundle(family).model, FAMILIES[family]) == FAMILIES[family].norm_placement


def test_gpt_neox_without_parallel_residual_is_pre_norm(tokenizer: PreTrainedTokenizerBase) -> None:
    model = families.make_model("gpt_neox", tokenizer, use_parallel_residual=False)
    row = architecture_of(model, "test")
    placement = measured_placement(model, FAMILIES["gpt_neox"])
    assert placement == "pre"
    assert row.norm_placement == placement


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.fused and not row.fused_by_head])
def test_fused_projections_hold_query_key_value_side_by_side(family: str, family_bundle: BundleOf) -> None:
    """With the query zeroed every key scores the same, so attention must not depend on the keys; values must matter."""
    model, row = family_bundle(family).model, FAMILIES[family]
    (name, parts), = row.fused.items()
    assert parts == ("q", "k", "v")
    layers = [block.get_submodule(name) for block in row.block_list(model)]
    width = layers[0].bias.shape[0] // 3

    def rewrite_(part: int, value: float | None) -> None:
        rows = slice(part * width, (part + 1) * width)
        for layer in layers:
            weight = layer.weight.data.T if row.conv1d else layer.weight.data
            for tensor in (weight[rows], layer.bias.data[rows]):
                tensor.normal_(0, 0.5) if value is None else tensor.fill_(value)

    def logits() -> Tensor:
        with torch.inference_mode():
            return model(input_ids=IDS).logits

    rewrite_(parts.index("q"), 0.0)
    no_query = logits()
    rewrite_(parts.index("k"), None)
    assert torch.equal(logits(), no_query)
    rewrite_(parts.index("v"), None)
    assert not torch.allclose(logits(), no_query)


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.fused_by_head])
def test_projections_fused_by_head_hold_query_key_value_of_each_head_together(family: str, family_bundle: BundleOf) -> None:
    """As above, with rows [heads, 3, head_dim]."""
    model, row = family_bundle(family).model, FAMILIES[family]
    ((name, parts),) = row.fused.items()
    heads = model.config.num_attention_heads
    layers = [block.get_submodule(name) for block in row.block_list(model)]

    def rewrite_(part: int, value: float | None) -> None:
        for layer in layers:
            for tensor in (layer.weight.data, layer.bias.data):
                mine = tensor.view(heads, 3, -1, *tensor.shape[1:])[:, part]
                mine.normal_(0, 0.5) if value is None else mine.fill_(value)

    def logits() -> Tensor:
        with torch.inference_mode():
            return model(input_ids=IDS).logits

    rewrite_(parts.index("q"), 0.0)
    no_query = logits()
    rewrite_(parts.index("k"), None)
    assert torch.equal(logits(), no_query)
    rewrite_(parts.index("v"), None)
    assert not torch.allclose(logits(), no_query)


def test_unknown_family_is_refused_by_name_with_what_is_admitted() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))
    assert family_of(model) == "bloom"
    with pytest.raises(UnsupportedModel, match="head clustering does not know the model family 'bloom'.*gpt2.*llama.*opt_post_norm"):
        architecture_of(model, "head clustering")


def test_post_norm_opt_has_projections_around_the_blocks_and_no_final_norm(family_bundle: BundleOf) -> None:
    model = family_bundle("opt_post_norm").model
    assert model.model.decoder.project_in is not None and model.model.decoder.project_out is not None
    assert model.model.decoder.final_layer_norm is None and FAMILIES["opt_post_norm"].final_norm is None


@on_every_family
def test_tiny_models_have_no_default_norms_or_biases(family: str, family_bundle: BundleOf) -> None:
    for path, module in family_bundle(family).model.named_modules():
        bias = getattr(module, "bias", None)
        if "Norm" in type(module).__name__:
            assert not torch.allclose(module.weight, torch.ones_like(module.weight)), path
        if isinstance(bias, Tensor):
            assert bias.abs().min() > 0 or bias.abs().max() > 0.05, path
