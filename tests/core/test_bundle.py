"""The bundle: its four slots, clones over the same tensors, bytes of weights by what they are for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, DynamicCache

from compression.quant.technique import BnbInt8, BnbNf4
from core.architectures import FAMILIES
from core.bundle import Bundle, ModelInfo, storage_bytes, tensors_of, weight_bytes
from core.decoding import cache_argument
from core.reversible import Edits
from tests import contract, families

BundleOf = Callable[[str], Bundle]


def test_filters_are_applied_in_order(llama: Bundle) -> None:
    llama.prompt_filters = (lambda text: text + "a", lambda text: text + "b", str.upper)
    assert llama.filter_prompt("x") == "XAB"


def test_no_filter_leaves_the_text(llama: Bundle) -> None:
    assert llama.filter_prompt("  as\nis ") == "  as\nis "


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_context_length_is_what_the_model_was_made_for(family: str, family_bundle: BundleOf) -> None:
    assert family_bundle(family).context_length == families.POSITIONS


def test_context_length_without_any_limit_in_the_configuration_is_2048(llama: Bundle) -> None:
    llama.model = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))  # ALiBi: no table of positions
    assert llama.context_length == 2048


def test_each_request_gets_its_own_empty_cache(llama: Bundle) -> None:
    one, two = llama.cache_factory(), llama.cache_factory()
    assert isinstance(one, DynamicCache) and one is not two
    with torch.inference_mode():
        llama.model(input_ids=torch.tensor([[3, 4, 5]]), **cache_argument(llama.model, one))
    assert one.get_seq_length() == 3 and two.get_seq_length() == 0 and llama.cache_factory().get_seq_length() == 0


# Clones.


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_clone_has_the_same_tensors_and_its_own_modules(family: str, family_bundle: BundleOf) -> None:
    bundle = family_bundle(family)
    clone = bundle.clone()
    mine = dict([*bundle.model.named_parameters(remove_duplicate=False), *bundle.model.named_buffers(remove_duplicate=False)])
    theirs = dict([*clone.model.named_parameters(remove_duplicate=False), *clone.model.named_buffers(remove_duplicate=False)])
    assert list(mine) == list(theirs)
    assert all(theirs[name] is tensor for name, tensor in mine.items())
    modules = set(map(id, bundle.model.modules()))
    assert not any(id(module) in modules for module in clone.model.modules())
    assert torch.equal(contract.logits_of(clone), contract.logits_of(bundle))


def test_clone_costs_no_weight_bytes(llama: Bundle) -> None:
    clone = llama.clone()
    alone = storage_bytes(tensors_of([llama.model]))
    assert storage_bytes(tensors_of([llama.model, clone.model])) == alone


def test_editing_a_clone_leaves_the_original_alone(llama: Bundle) -> None:
    before, logits = contract.snapshot(llama), contract.logits_of(llama)
    clone, edits = llama.clone(), Edits()
    edits.swap_module(clone.model, "model.layers.0.mlp", nn.Identity())
    edits.add_hook(clone.model.model.norm.register_forward_hook, lambda module, args, output: output * 2)
    edits.set_attr(clone, "prompt_filters", (str.upper,))
    edits.set_attr(clone.model.config, "use_cache", False)
    assert not torch.equal(contract.logits_of(clone), logits)
    contract.assert_unchanged(before, llama, "clone edited")
    assert torch.equal(contract.logits_of(llama), logits)


def test_clone_keeps_tied_weights_tied(llama: Bundle) -> None:
    clone = llama.clone()
    assert clone.model.lm_head.weight is clone.model.model.embed_tokens.weight


def test_clone_of_a_changed_bundle_has_the_change(llama: Bundle) -> None:
    with contract.apply(BnbInt8(), llama):
        clone = llama.clone()
        assert torch.equal(contract.logits_of(clone), contract.logits_of(llama))


# Bytes.


def expected_bytes(model: nn.Module) -> int:
    """Bytes of every distinct tensor, counted by object."""
    return sum({id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}.values())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weight_bytes_of_a_plain_model_are_its_tensors(family: str, family_bundle: BundleOf) -> None:
    bundle = family_bundle(family)
    counted = weight_bytes(bundle, ())
    assert counted.in_use == expected_bytes(bundle.model)
    assert counted.kept_for_undo == 0 and counted.packed == 0


def test_tied_weights_count_once(llama: Bundle) -> None:
    table = llama.model.lm_head.weight
    assert llama.model.model.embed_tokens.weight is table
    tied = weight_bytes(llama, ()).in_use
    llama.model.lm_head.weight = nn.Parameter(table.detach().clone())
    assert weight_bytes(llama, ()).in_use == tied + table.nbytes


def test_views_of_one_storage_count_once() -> None:
    base = torch.zeros(100)
    assert sum(storage_bytes([base, base[:10], base.view(10, 10), torch.zeros(0)]).values()) == 400


def test_swapped_out_weights_count_as_kept_for_undo_until_undone(llama: Bundle) -> None:
    layer = llama.model.get_submodule("model.layers.0.mlp.down_proj")
    whole, edits = weight_bytes(llama, ()).in_use, Edits()
    small = nn.Linear(128, 64, bias=False).to(torch.bfloat16)
    edits.swap_module(llama.model, "model.layers.0.mlp.down_proj", small)
    counted = weight_bytes(llama, [edits], [small])
    assert counted.kept_for_undo == layer.weight.nbytes
    assert counted.packed == small.weight.nbytes == layer.weight.nbytes // 2
    assert counted.in_use == whole - layer.weight.nbytes + small.weight.nbytes
    edits.undo()
    assert weight_bytes(llama, [edits]) == weight_bytes(llama, ())


def test_a_replaced_module_whose_weight_is_still_used_keeps_nothing(llama: Bundle) -> None:
    edits = Edits()
    old = llama.model.get_submodule("model.layers.0.mlp.down_proj")
    new = nn.Linear(128, 64, bias=False)
    new.weight = old.weight
    edits.swap_module(llama.model, "model.layers.0.mlp.down_proj", new)
    assert weight_bytes(llama, [edits]).kept_for_undo == 0


@pytest.mark.parametrize("technique", [BnbInt8(), BnbNf4(), BnbNf4(block_size=128)], ids=lambda t: t.spell())
def test_quantised_weights_are_counted_as_packed_with_their_scales(technique: BnbInt8 | BnbNf4, llama: Bundle) -> None:
    whole = weight_bytes(llama, ()).in_use
    with contract.apply(technique, llama) as applied:
        counted = weight_bytes(llama, [applied.edits], applied.packed)
        assert counted.packed == contract.weight_bytes_of(llama, applied.report.touched) == applied.report.bytes_after
        assert counted.kept_for_undo == applied.report.bytes_before
        assert counted.in_use == whole - applied.report.bytes_before + applied.report.bytes_after


def test_double_quantised_scales_are_counted_too(family_bundle: BundleOf) -> None:
    bundle = family_bundle("gpt2")  # 48 wide, so the fused kernel that drops the second level does not take it
    with contract.apply(BnbNf4(double_quant=True), bundle) as applied:
        assert applied.report.bytes_after == contract.weight_bytes_of(bundle, applied.report.touched)


def test_device_is_where_the_input_goes(llama: Bundle) -> None:
    assert llama.device == torch.device("cpu")


def test_model_info_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        ModelInfo("a", None, "float32", "local").dtype = "bfloat16"  # type: ignore[misc]
