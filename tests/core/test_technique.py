"""Techniques as configurations: options are checked, spelled, compared; apply is all or nothing."""

from __future__ import annotations

import math
import os
from dataclasses import FrozenInstanceError, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compression.quant.technique import BnbInt8, BnbNf4
from core import architectures
from core.bundle import Bundle
from core.compatibility import compatible, ordered
from core.errors import CalibrationError, IncompatibleTechniques, InvalidRequest, UnsupportedModel
from core.reversible import Edits
from core.technique import Applied, Effect, Label, Prepared, Report, Stage, Technique, option
from engines.catalog import TECHNIQUES
from optim.word_removal.technique import WordRemoval


@dataclass(frozen=True)
class Example(Technique):
    """One option of each kind."""

    name: ClassVar[str] = "example"
    title: ClassVar[str] = "Example"
    summary: ClassVar[str] = "One option of each kind."
    effect: ClassVar[Effect] = Effect.LOSSY
    stage: ClassVar[Stage] = Stage.WEIGHTS

    share: float = option(0.5, "a share", minimum=0.0, maximum=1.0, step=0.1, neutral=0.0)
    count: int = option(4, "a count", minimum=1, maximum=64)
    on: bool = option(False, "a switch")
    mode: str = option("a", "a choice", choices=("a", "b"))
    bits: int = option(8, "a choice of numbers", choices=(4, 8))
    free: float = option(1.0, "no limits")

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        edits.set_attr(bundle, "prompt_filters", (str.upper,))
        packed = nn.Identity()
        return Report(self.name, Label.SIMULATED, ("prompt_filters",)), (packed,)


@pytest.mark.parametrize("settings", [
    {}, {"share": 0}, {"share": 1}, {"share": 0.0}, {"share": 1.0}, {"count": 1}, {"count": 64}, {"on": True}, {"mode": "b"}, {"bits": 4}, {"free": -1e9},
], ids=str)
def test_values_inside_the_limits_are_taken(settings: dict[str, Any]) -> None:
    made = Example(**settings)
    assert {name: getattr(made, name) for name in settings} == settings


@pytest.mark.parametrize(("settings", "allowed"), [
    ({"share": math.nan}, "finite number"), ({"share": math.inf}, "it must"), ({"share": -math.inf}, "it must"),
    pytest.param({"free": math.inf}, "finite number"),
    ({"share": "0.5"}, "finite number"), ({"share": None}, "finite number"), ({"share": True}, "finite number"), ({"share": [0.5]}, "finite number"),
    ({"share": -0.01}, "between 0.0 and 1.0"), ({"share": 1.01}, "between 0.0 and 1.0"), ({"share": -(10**300)}, "between 0.0 and 1.0"),
    ({"count": 0}, "between 1 and 64"), ({"count": 65}, "between 1 and 64"), ({"count": 2.5}, "whole number"), ({"count": math.nan}, "finite number"),
    ({"count": "4"}, "finite number"), ({"count": False}, "finite number"), ({"on": 1}, "true or false"), ({"on": 0}, "true or false"),
    ({"on": "true"}, "true or false"), ({"on": None}, "true or false"), ({"mode": "c"}, "choose one of a, b"), ({"mode": None}, "choose one of a, b"),
    ({"mode": 1}, "choose one of a, b"), ({"bits": 5}, "choose one of 4, 8"), ({"bits": "8"}, "choose one of 4, 8"), ({"bits": True}, "choose one of 4, 8"),
    ({"bits": [8]}, "choose one of 4, 8"), ({"free": math.nan}, "finite number"),
    pytest.param({"count": 10**400}, "between 1 and 64"),
], ids=str)
def test_values_outside_are_refused_with_option_value_and_what_is_allowed(settings: dict[str, Any], allowed: str) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(InvalidRequest) as caught:
        Example(**settings)
    assert f"example: {name} is {value!r}" in str(caught.value) and allowed in str(caught.value)


def test_unknown_options_are_no_options() -> None:
    with pytest.raises(TypeError):
        Example(nothing=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(("one", "other"), [(WordRemoval(every=4), WordRemoval(every=4.0)), (WordRemoval(minimum_words=7), WordRemoval(minimum_words=7.0))])  # type: ignore[arg-type]
def test_equal_numbers_are_spelled_alike(one: Technique, other: Technique) -> None:
    assert one == other
    assert one.spell() == other.spell()


def test_a_technique_cannot_be_changed_and_is_its_configuration() -> None:
    made = Example(share=0.25)
    with pytest.raises(FrozenInstanceError):
        made.share = 0.75  # type: ignore[misc]
    assert made == Example(share=0.25) and made != Example() and hash(made) == hash(Example(share=0.25))


def test_settings_are_plain_values_that_make_the_technique_again() -> None:
    made = Example(share=0.25, on=True)
    assert made.settings() == {"share": 0.25, "count": 4, "on": True, "mode": "a", "bits": 8, "free": 1.0}
    assert Example(**made.settings()) == made


def test_spell_names_what_differs_from_the_default() -> None:
    assert Example().spell() == "example"
    assert Example(share=0.25, mode="b").spell() == "example:share=0.25,mode=b"


def test_neutral_is_the_configuration_marked_so_or_none() -> None:
    assert Example.neutral() == Example(share=0.0)
    assert WordRemoval.neutral() == WordRemoval(every=0) and BnbInt8.neutral() == BnbInt8(share=0.0)

    @dataclass(frozen=True)
    class Without(Example):
        share: float = option(0.5, "a share")

    assert Without.neutral() is None


@pytest.mark.parametrize("kind", [WordRemoval, BnbInt8, BnbNf4])
def test_every_option_has_help_and_limits_that_hold_its_default(kind: type[Technique]) -> None:
    for item in fields(kind):
        meta = item.metadata
        assert len(meta["help"]) > 5
        if meta["choices"] is not None:
            assert item.default in meta["choices"]
        elif not isinstance(item.default, bool):
            assert meta["minimum"] <= item.default <= meta["maximum"]


@given(st.one_of(st.floats(), st.integers(), st.booleans(), st.text(max_size=5), st.none()))
def test_any_value_is_taken_inside_the_limits_or_refused_in_words(value: Any) -> None:
    inside = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    try:
        made = Example(share=value)
    except InvalidRequest as error:
        assert not inside and "share" in str(error)
    else:
        assert inside and made.share == value


# Applied.


def test_apply_returns_report_edits_and_packed_modules(llama: Bundle) -> None:
    applied = Example().apply(llama, Prepared())
    assert llama.filter_prompt("x") == "X"
    assert applied.report.touched == ("prompt_filters",) and len(applied.packed) == 1
    applied.undo()
    assert llama.filter_prompt("x") == "x" and applied.packed == ()


def test_with_block_undoes_at_its_end_and_on_errors(llama: Bundle) -> None:
    with Example().apply(llama, Prepared()) as applied:
        assert isinstance(applied, Applied) and llama.filter_prompt("x") == "X"
    assert llama.filter_prompt("x") == "x"
    with pytest.raises(KeyError), Example().apply(llama, Prepared()):
        raise KeyError
    assert llama.filter_prompt("x") == "x"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
def test_apply_that_fails_undoes_and_passes_the_error_on(error: type[BaseException], llama: Bundle) -> None:
    @dataclass(frozen=True)
    class Failing(Example):
        def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
            super()._apply(bundle, prepared, edits)
            raise error

    with pytest.raises(error):
        Failing().apply(llama, Prepared())
    assert llama.prompt_filters == ()


def test_a_technique_without_an_apply_says_so(llama: Bundle) -> None:
    with pytest.raises(NotImplementedError):
        Technique.apply(Bare(), llama, Prepared())


class Bare(Technique):
    name = "bare"


def test_prepare_and_check_do_nothing_unless_overridden(llama: Bundle) -> None:
    assert Example().check(llama) is None
    assert Example().prepare(llama) == Prepared()


# Prepared, on disk.


def test_prepared_comes_back_with_every_bit_and_its_meta(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "half": torch.randn(5).to(torch.bfloat16), "ids": torch.arange(6), "turned": torch.randn(3, 4).T}
    Prepared(tensors, {"clusters": "4", "note": "é 日本"}).save(tmp_path / "p.safetensors")
    loaded = Prepared.load(tmp_path / "p.safetensors")
    assert loaded.meta == {"clusters": "4", "note": "é 日本"} and loaded.tensors.keys() == tensors.keys()
    assert all(loaded.tensors[n].dtype == t.dtype and torch.equal(loaded.tensors[n], t) for n, t in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_prepared_without_anything_comes_back(tmp_path: Path) -> None:
    Prepared().save(tmp_path / "p.safetensors")
    assert Prepared.load(tmp_path / "p.safetensors") == Prepared()


def test_prepared_whose_saving_fails_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Prepared({"a": torch.ones(2)}).save(tmp_path / "p.safetensors")

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError):
        Prepared({"a": torch.zeros(2)}).save(tmp_path / "p.safetensors")
    assert torch.equal(Prepared.load(tmp_path / "p.safetensors").tensors["a"], torch.ones(2))


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100, "cut"], ids=["missing", "empty", "noise", "cut"])
def test_prepared_that_cannot_be_read_is_a_calibration_error(content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    if content == "cut":
        Prepared({"a": torch.ones(99)}).save(path)
        path.write_bytes(path.read_bytes()[:-8])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"p\.safetensors cannot be read.*made again"):
        Prepared.load(path)


# Refusals of a family.


def test_refusal_of_a_family_comes_from_the_table_with_its_reason(llama: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (WordRemoval, BnbInt8, Example):
        kind().check(llama)
        with monkeypatch.context() as patch:
            patch.setitem(architectures.REFUSED, ("llama", kind.name), "its rotation cannot be absorbed")
            with pytest.raises(UnsupportedModel, match=r"its rotation cannot be absorbed\."):
                kind().check(llama)
            patch.setitem(architectures.REFUSED, ("gpt2", kind.name), "another family")
        kind().check(llama)


def test_table_of_refusals_names_families_and_techniques_that_exist() -> None:
    for (family, technique), reason in architectures.REFUSED.items():
        assert family in architectures.FAMILIES and technique in TECHNIQUES and len(reason) > 10


# Order and compatibility.


def test_techniques_are_ordered_by_stage_then_name() -> None:
    assert ordered([BnbInt8(), WordRemoval()]) == (WordRemoval(), BnbInt8())
    assert ordered([Example(), BnbNf4()]) == (BnbNf4(), Example()) == ordered([BnbNf4(), Example()])
    assert ordered([]) == ()


def test_excluded_pair_is_refused_with_the_reason_in_any_order_and_company() -> None:
    for chosen in ([BnbInt8(), BnbNf4()], [BnbNf4(), BnbInt8()], [BnbNf4(), WordRemoval(), BnbInt8()]):
        with pytest.raises(IncompatibleTechniques, match="bnb_int8 and bnb_nf4 do not go together: both replace the same linear layers"):
            ordered(chosen)
        assert not compatible(chosen)
    assert compatible([BnbInt8(), WordRemoval()])


def test_the_same_technique_twice_is_refused_whatever_its_settings() -> None:
    with pytest.raises(IncompatibleTechniques, match="word_removal is given twice"):
        ordered([WordRemoval(every=3), BnbInt8(), WordRemoval(every=4)])


def test_stages_are_in_the_order_of_a_request() -> None:
    assert [s.name for s in sorted(Stage)] == ["PROMPT", "VOCAB", "HEADS", "WEIGHTS", "ACTIVATIONS", "PACKING", "CACHE", "STORE", "RUNTIME"]
