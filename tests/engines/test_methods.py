"""Method names as people type them."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.quant.technique import BnbInt8, BnbNf4
from core.compatibility import EXCLUDES
from core.errors import IncompatibleTechniques, InvalidRequest
from core.technique import Technique
from engines.catalog import TECHNIQUES
from engines.methods import BASELINE, make_technique, method_name, parse_method
from optim.word_removal.technique import WordRemoval


def values_of(item: object) -> st.SearchStrategy[object]:
    """Any value that an option admits, from its metadata."""
    meta, default = item.metadata, item.default  # type: ignore[attr-defined]
    if meta["choices"] is not None:
        return st.sampled_from(meta["choices"])
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(meta["minimum"], meta["maximum"])
    return st.floats(meta["minimum"], meta["maximum"])


@st.composite
def techniques(draw: st.DrawFn) -> Technique:
    kind = TECHNIQUES[draw(st.sampled_from(sorted(TECHNIQUES)))]
    return kind(**{f.name: draw(values_of(f)) for f in fields(kind)})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(techniques(), max_size=3, unique_by=lambda t: t.name))
def test_spelling_is_read_back_as_the_same_techniques(chosen: list[Technique]) -> None:
    if any(frozenset({a.name, b.name}) in EXCLUDES for a in chosen for b in chosen if a is not b):
        with pytest.raises(IncompatibleTechniques):
            method_name(chosen)
        return
    spelled = method_name(chosen)
    parsed = parse_method(spelled)
    assert sorted(parsed, key=lambda t: t.name) == sorted(chosen, key=lambda t: t.name)
    assert method_name(parsed) == spelled
    assert len(spelled) <= 300


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("baseline", ()),
        (" baseline ", ()),
        ("word_removal", (WordRemoval(),)),
        ("word_removal:every=4", (WordRemoval(every=4),)),
        (" word_removal : every = 4 , minimum_words = 9 ", (WordRemoval(every=4, minimum_words=9),)),
        ("bnb_nf4:double_quant=true", (BnbNf4(double_quant=True),)),
        ("bnb_nf4:double_quant=FALSE,block_size=128", (BnbNf4(block_size=128),)),
        ("bnb_int8:threshold=0", (BnbInt8(threshold=0),)),
        ("bnb_int8:share=.5", (BnbInt8(share=0.5),)),
        ("word_removal+bnb_int8", (WordRemoval(), BnbInt8())),
    ],
)
def test_method_is_parsed(typed: str, expected: tuple[Technique, ...]) -> None:
    assert parse_method(typed) == expected


def test_default_options_are_not_spelled() -> None:
    assert method_name([WordRemoval()]) == "word_removal"
    assert method_name([WordRemoval(every=5)]) == "word_removal:every=5"
    assert method_name([]) == BASELINE


def test_order_of_typing_does_not_matter() -> None:
    forwards, backwards = parse_method("bnb_int8:share=0.5+word_removal:every=4"), parse_method("word_removal:every=4+bnb_int8:share=0.5")
    assert forwards == backwards
    assert [t.stage for t in forwards] == sorted(t.stage for t in forwards)
    assert method_name(tuple(reversed(forwards))) == method_name(forwards)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("word_removal:every=4", "word_removal:every=4.0"),
        ("bnb_int8:share=0", "bnb_int8:share=0.0"),
        ("bnb_int8:share=0", "bnb_int8:share=-0.0"),
        ("bnb_int8:threshold=3,share=0.5", "bnb_int8:share=.50,threshold=3.0"),
        ("word_removal:every=3", "word_removal"),
        ("word_removal:", "word_removal"),
    ],
)
def test_one_setting_has_one_spelling(one: str, other: str) -> None:
    """The spelling is the engine's key: two spellings of one thing would load it twice."""
    assert method_name(parse_method(one)) == method_name(parse_method(other))


@pytest.mark.parametrize(("typed", "meant"), [("word_removl", "word_removal"), ("bnb_int", "bnb_int8"), ("bnb_nf5", "bnb_nf4"), ("Word_Removal", "word_removal")])
def test_unknown_name_is_refused_with_a_suggestion(typed: str, meant: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_method(typed)
    assert f"Did you mean {meant}?" in str(refusal.value)
    assert repr(typed) in str(refusal.value)


def test_unknown_name_far_from_all_is_refused_with_the_list() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_method("zzz")
    assert "Did you mean" not in str(refusal.value)
    assert all(name in str(refusal.value) for name in (BASELINE, *TECHNIQUES))


@pytest.mark.parametrize(
    "typed",
    [
        "b\u0430seline",  # Cyrillic a
        "word\uff3fremoval",  # fullwidth low line
        "\uff42nb_int8",
        "word_removal\u200b",
        "bnb_int8\u0301",
        "../bnb_int8", "/etc/passwd", "//example.org/x", "bnb_int8;rm -rf /", "bnb_int8 word_removal", "word_removal|bnb_int8",
        "__class__", "Technique", "+", "word_removal+", "+word_removal", "word_removal++bnb_int8",
        "x" * 300,
    ],
)
def test_name_not_in_the_catalog_is_refused(typed: str) -> None:
    with pytest.raises(InvalidRequest, match="There is no method") as refusal:
        parse_method(typed)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("typed", ["", " ", "\n", None, 3, True, ["baseline"], {"a": 1}, "word_removal" * 26, "é" * 10_000], ids=lambda v: repr(v)[:20])
def test_what_is_no_method_name_is_refused(typed: object) -> None:
    with pytest.raises(InvalidRequest, match="The method is") as refusal:
        parse_method(typed)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("word_removal:evry=4", "no option 'evry'"),
        ("word_removal:__class__=4", "no option '__class__'"),
        ("word_removal:name=x", "no option 'name'"),
        ("word_removal:every", "write option=value"),
        ("word_removal:=4", "no option ''"),
        ("word_removal:every=4:minimum_words=3", "every is '4:minimum_words=3'"),
    ],
)
def test_unknown_option_is_refused_by_name(typed: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_method(typed)
    assert says in str(refusal.value)


def test_unknown_option_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="it has every, minimum_words"):
        parse_method("word_removal:n=4")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("word_removal", "every", value) for value in ("2", "-3", "1e9", "nan", "inf", "abc", "", "true", "3.5", "None", "[3]")
    ] + [
        ("word_removal", "minimum_words", value) for value in ("-1", "1001", "3.7", "1e9", "nan", "inf", "-inf", "abc", "", "true")
    ] + [
        ("bnb_int8", "share", value) for value in ("-0.1", "1.1", "nan", "inf", "abc", "", "true", "9" * 280)
    ] + [
        ("bnb_nf4", "block_size", value) for value in ("0", "63", "64.5", "nan", "abc", "true")
    ] + [
        ("bnb_nf4", "double_quant", value) for value in ("1", "0", "yes", "", "nan")
    ],
)
def test_bad_value_is_refused_by_technique_option_and_value(name: str, option: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name}: {option} is ") as refusal:
        parse_method(f"{name}:{option}={value}")
    assert value[:30].lower().removesuffix(".0") in str(refusal.value).lower() or value == "1e9"


@pytest.mark.parametrize("value", [None, [3], {"a": 1}, 10**400, float("nan"), "4", True], ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize(("name", "option"), [("word_removal", "every"), ("word_removal", "minimum_words"), ("bnb_int8", "share")])
def test_bad_value_of_a_form_is_refused_by_technique_and_option(name: str, option: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name}: {option} is "):
        make_technique(name, {option: value})


def test_technique_given_twice_is_refused() -> None:
    with pytest.raises(IncompatibleTechniques, match="word_removal is given twice"):
        parse_method("word_removal:every=3+bnb_int8+word_removal:every=4")


def test_option_given_twice_is_refused() -> None:
    """Of two values one would be dropped without a word."""
    with pytest.raises(InvalidRequest, match="every"):
        parse_method("word_removal:every=4,every=5")


def test_techniques_that_exclude_each_other_are_refused_with_the_reason() -> None:
    with pytest.raises(IncompatibleTechniques, match="same linear layers"):
        parse_method("bnb_int8+bnb_nf4")


def test_address_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="https"):
        parse_method("https://example.org/x")


def test_baseline_cannot_be_part_of_a_combination() -> None:
    with pytest.raises(InvalidRequest, match="cannot be part of a combination"):
        parse_method("baseline+word_removal")


def test_every_technique_of_the_catalog_is_listed_under_its_own_name() -> None:
    assert {name: kind.name for name, kind in TECHNIQUES.items()} == {name: name for name in TECHNIQUES}
    assert BASELINE not in TECHNIQUES
