"""Edits: what is changed is put back exactly, last change first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from core.bundle import Bundle
from core.reversible import Edits


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.LayerNorm(6)}), nn.ModuleList([nn.ReLU(), nn.Linear(6, 2)]))


def test_swap_module_puts_the_new_module_at_the_path_and_undo_the_old_object() -> None:
    root, edits, new = stack(), Edits(), nn.Identity()
    old = root[1]["a"]
    edits.swap_module(root, "1.a", new)
    assert root[1]["a"] is new
    edits.undo()
    assert root[1]["a"] is old


def test_swap_module_works_at_the_top_and_inside_a_module_list() -> None:
    root, edits = stack(), Edits()
    first, last = root[0], root[2][1]
    one, two = nn.Identity(), nn.Identity()
    edits.swap_module(root, "0", one)
    edits.swap_module(root, "2.1", two)
    assert root[0] is one and root[2][1] is two
    edits.undo()
    assert root[0] is first and root[2][1] is last


def test_swap_module_keeps_the_order_of_names_and_of_the_state_dict() -> None:
    root, edits = stack(), Edits()
    names, keys = [n for n, _ in root.named_modules()], list(root.state_dict())
    edits.swap_module(root, "0", nn.Linear(4, 6))
    assert [n for n, _ in root.named_modules()] == names and list(root.state_dict()) == keys
    edits.undo()
    assert [n for n, _ in root.named_modules()] == names and list(root.state_dict()) == keys


@pytest.mark.parametrize("training", [True, False])
def test_swap_module_gives_the_new_module_the_mode_of_the_old(training: bool) -> None:
    root, new = stack().train(training), nn.Dropout()
    new.train(not training)
    Edits().swap_module(root, "0", new)
    assert new.training is training


def test_replaced_lists_swapped_out_modules_until_undo() -> None:
    root, edits = stack(), Edits()
    first, second = root[0], nn.Identity()
    edits.swap_module(root, "0", second)
    edits.swap_module(root, "0", nn.Identity())
    assert edits.replaced == [first, second]
    edits.undo()
    assert edits.replaced == [] and root[0] is first


@pytest.mark.parametrize("path", ["7", "1.zzz", "nothing.here", "0.weight"])
def test_swap_module_at_an_unknown_path_raises_and_changes_nothing(path: str) -> None:
    root, edits = stack(), Edits()
    before = dict(root.named_modules())
    with pytest.raises(AttributeError):
        edits.swap_module(root, path, nn.Identity())
    assert dict(root.named_modules()) == before and edits.replaced == []
    edits.undo()
    assert dict(root.named_modules()) == before


def test_hook_acts_until_undo_and_other_hooks_stay() -> None:
    layer, edits = nn.Linear(3, 3), Edits()
    x = torch.randn(2, 3)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    before = layer(x)
    edits.add_hook(layer.register_forward_hook, lambda module, args, output: output * 2)
    edits.add_hook(layer.register_forward_pre_hook, lambda module, args: (args[0] * 0,), prepend=True)
    assert torch.equal(layer(x), ((layer.bias + 1) * 2).expand(2, 3))
    edits.undo()
    assert torch.equal(layer(x), before)
    assert len(layer._forward_hooks) == 1 and len(layer._forward_pre_hooks) == 0


class Plain:
    shared = "class value"

    def __init__(self) -> None:
        self.value: Any = 1


@pytest.mark.parametrize("new", [2, None, "text", [1]])
def test_set_attr_replaces_and_puts_back_the_same_object(new: Any) -> None:
    owner, edits, old = Plain(), Edits(), object()
    owner.value = old
    edits.set_attr(owner, "value", new)
    assert owner.value is new
    edits.undo()
    assert owner.value is old


def test_set_attr_of_a_new_name_is_removed_again() -> None:
    owner, edits = Plain(), Edits()
    edits.set_attr(owner, "added", 5)
    assert owner.added == 5
    edits.undo()
    assert not hasattr(owner, "added") and vars(owner) == {"value": 1}


def test_set_attr_over_a_class_default_shows_the_default_again() -> None:
    owner, edits = Plain(), Edits()
    edits.set_attr(owner, "shared", "mine")
    assert owner.shared == "mine" and Plain.shared == "class value"
    edits.undo()
    assert owner.shared == "class value" and "shared" not in vars(owner)


@pytest.mark.parametrize(("name", "value"), [
    ("weight", nn.Parameter(torch.zeros(6, 4))), ("bias", None), ("note", nn.Parameter(torch.zeros(1))), ("extra", nn.Identity()),
    ("training", False), ("in_features", 9), ("tensor", torch.ones(2)),
])
def test_set_attr_on_a_module_keeps_its_tables(name: str, value: Any) -> None:
    layer, edits = nn.Linear(4, 6), Edits()
    parameters, keys = dict(layer.named_parameters()), list(vars(layer))
    edits.set_attr(layer, name, value)
    assert getattr(layer, name) is value
    edits.undo()
    assert list(layer.named_parameters()) == list(parameters.items())
    assert list(vars(layer)) == keys and list(layer._parameters) == ["weight", "bias"] and not layer._modules


def test_set_attr_on_a_buffer_keeps_it_a_buffer() -> None:
    layer, edits = nn.BatchNorm1d(3), Edits()
    old, keys = layer.running_mean, list(layer.state_dict())
    edits.set_attr(layer, "running_mean", torch.ones(3))
    assert list(layer.state_dict()) == keys and float(layer.state_dict()["running_mean"].sum()) == 3
    edits.undo()
    assert layer.running_mean is old and list(layer.state_dict()) == keys


class WithProperty:
    def __init__(self) -> None:
        self._hidden = 1

    @property
    def value(self) -> int:
        return self._hidden

    @value.setter
    def value(self, new: int) -> None:
        self._hidden = new


def test_set_attr_through_a_property_is_undone() -> None:
    owner, edits = WithProperty(), Edits()
    edits.set_attr(owner, "value", 5)
    assert owner.value == 5
    edits.undo()
    assert owner.value == 1


@pytest.mark.parametrize(("name", "value"), [("max_position_embeddings", 7), ("_attn_implementation", "eager"), ("hidden_size", 9)])
def test_set_attr_on_a_mapped_configuration_entry_is_undone(name: str, value: Any, family_bundle: Callable[[str], Bundle]) -> None:
    config, edits = family_bundle("gpt2").model.config, Edits()
    before = getattr(config, name)
    assert before != value
    edits.set_attr(config, name, value)
    assert getattr(config, name) == value
    edits.undo()
    assert getattr(config, name) == before


def test_undo_takes_changes_back_last_first() -> None:
    owner, root, edits = Plain(), stack(), Edits()
    first = root[0]
    for value in (2, 3, 4):
        edits.set_attr(owner, "value", value)
        edits.swap_module(root, "0", nn.Identity())
    edits.undo()
    # First change first would end at the value and the module before the last change.
    assert owner.value == 1 and root[0] is first


def test_undo_again_does_nothing() -> None:
    owner, edits = Plain(), Edits()
    edits.set_attr(owner, "value", 2)
    edits.undo()
    owner.value = 10
    edits.undo()
    assert owner.value == 10


def test_edits_inside_a_swapped_module_do_not_reach_the_old_one() -> None:
    root, edits, new = stack(), Edits(), nn.Linear(4, 6)
    old = root[0]
    edits.swap_module(root, "0", new)
    edits.set_attr(root[0], "bias", None)
    assert old.bias is not None
    edits.undo()
    assert root[0] is old and new.bias is not None


CHANGES = st.lists(st.tuples(st.sampled_from(["swap", "hook", "attr", "new", "parameter"]), st.sampled_from(["0", "1.a", "1.b", "2.1"])), max_size=12)


@given(CHANGES)
def test_any_sequence_of_edits_is_undone_exactly(changes: list[tuple[str, str]]) -> None:
    root, edits = stack(), Edits()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))

    def run() -> torch.Tensor:
        return root[2][1](root[1]["b"](root[1]["a"](root[0](x))))

    def state() -> list[Any]:
        return [(n, id(m), list(vars(m)), list(m._parameters.values()), len(m._forward_hooks)) for n, m in root.named_modules()]

    output, before = run(), state()
    sizes = {"0": (4, 6), "1.a": (6, 6), "1.b": (6, 6), "2.1": (6, 2)}
    for kind, path in changes:
        module = root.get_submodule(path)
        if kind == "swap":
            edits.swap_module(root, path, nn.Linear(*sizes[path]))
        elif kind == "hook":
            edits.add_hook(module.register_forward_hook, lambda module, args, out: out + 1)
        elif kind == "attr":
            edits.set_attr(module, "training", not module.training)
        elif kind == "new":
            edits.set_attr(module, "mark", kind)
        else:
            edits.set_attr(module, "weight", nn.Parameter(module.weight.detach() * 2))
    if any(kind in ("swap", "hook") for kind, _ in changes):
        assert not torch.equal(run(), output)
    edits.undo()
    assert state() == before and torch.equal(run(), output)
