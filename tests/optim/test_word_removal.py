"""Word removal: which words stay, how many go, and that the rest of the text stays as it was."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.bundle import Bundle
from core.technique import Label
from engines.prompting import build_prompt
from optim.word_removal.ops import (
    ABBREVIATIONS,
    COMMON_OPENERS,
    NEGATIONS,
    NUMBER_WORDS,
    RemovalResult,
    ends_sentence,
    is_protected,
    remove_words,
)
from optim.word_removal.technique import WordRemoval
from tests import contract

PLAIN = "red green blue white black brown grey pink gold silver amber violet"
EVERY = st.sampled_from([2, 3, 4, 5, 7])


def core(word: str) -> str:
    """A word without what surrounds it."""
    return re.sub(r"^\W+|\W+$", "", word)


def cores(text: str) -> list[str]:
    return [c for c in map(core, text.split()) if c]


# How many, and which.


@pytest.mark.parametrize(("every", "text", "removed"), [
    (3, "red green white black grey pink silver amber", ("blue", "brown", "gold", "violet")),
    (4, "red green blue black brown grey gold silver amber", ("white", "pink", "violet")),
    (5, "red green blue white brown grey pink gold amber violet", ("black", "silver")),
])
def test_every_nth_word_of_plain_text_goes(every: int, text: str, removed: tuple[str, ...]) -> None:
    assert remove_words(PLAIN, every) == RemovalResult(text, 12, removed)


@pytest.mark.parametrize(("text", "expected", "removed"), [
    ("we saw London and Paris again", "we saw London Paris again", ("and",)),
    ("it costs 300 dollars or more today", "it costs 300 or more", ("dollars", "today")),
    ("please do not go there now again", "please do not there now", ("go", "again")),
    ("this is easy. The rest we read slowly", "this is easy. rest we slowly", ("The", "read")),
])
def test_where_the_nth_word_is_protected_the_next_one_that_is_not_goes(text: str, expected: str, removed: tuple[str, ...]) -> None:
    assert remove_words(text, 3) == RemovalResult(expected, len(text.split()), removed)


@pytest.mark.parametrize("word", [
    *sorted(NEGATIONS), *sorted(NUMBER_WORDS), "Seven", "don't", "isn\u2019t", "Won't", "NOT", "Never", "can't,", *sorted(ABBREVIATIONS), "42", "3.14", "2nd", "H2O", "end.", "what?", "stop!", "so:", "well;",
    "wait\u2026", 'said."', "done.)", "(open", '"quoted', "\u201cquoted", "[1]", "$5", "#tag", "@name", "a@b.example", "/usr/bin", "C:\\dir", "x=1", "snake_case", "<tag>",
    "a{b}", "\u3002", "--", "...", "\u662f\uff1f",
])
def test_word_that_carries_meaning_is_protected_anywhere(word: str) -> None:
    assert is_protected(word, starts_sentence=False) and is_protected(word, starts_sentence=True)


@pytest.mark.parametrize("word", ["London", "\u00c9cole", "McDonald", "Paris,", "Gamma", "Next"])
def test_word_with_a_capital_may_be_a_name_and_is_protected_anywhere(word: str) -> None:
    assert is_protected(word, starts_sentence=False) and is_protected(word, starts_sentence=True)


@pytest.mark.parametrize("word", sorted(word.capitalize() for word in COMMON_OPENERS - NEGATIONS - NUMBER_WORDS if word != "i"))
def test_word_that_often_opens_a_sentence_is_no_name_there(word: str) -> None:
    assert is_protected(word, starts_sentence=False) and not is_protected(word, starts_sentence=True)


@pytest.mark.parametrize("word", ["NASA", "AI", "GPU,"])
def test_acronym_is_protected_even_where_a_sentence_starts(word: str) -> None:
    assert is_protected(word, starts_sentence=True)


@pytest.mark.parametrize("word", ["the", "word,", "house)", "know", "nothingness", "cannon", "i", "I", "well-known", "it's", "\u65e5\u672c"])
def test_ordinary_word_may_go(word: str) -> None:
    assert not is_protected(word, starts_sentence=False)


@pytest.mark.parametrize(("word", "ends"), [
    ("end.", True), ("end?", True), ('end."', True), ("end.)", True), ("end\u3002", True), ("end", False), ("end,", False), ("e.g.", False), ("Dr.", False), ("3.14", False), ("list:", True),
])
def test_end_of_a_sentence_is_told_from_an_abbreviation(word: str, ends: bool) -> None:
    assert ends_sentence(word) is ends


def test_common_first_word_after_a_sentence_is_no_name() -> None:
    assert remove_words("alpha beta. The delta", 3).removed == ("The",)
    assert remove_words("alpha beta The delta", 3).removed == ("delta",)
    assert remove_words("alpha beta. Gamma delta", 3).removed == ("delta",)


def test_line_break_starts_a_sentence() -> None:
    assert remove_words("alpha beta\nThe delta", 3).removed == ("The",)


# The rest of the text.


@pytest.mark.parametrize(("text", "expected"), [
    ("first line word\nsecond line word\nthird line here", "first line\nsecond line\nthird line"),
    ("a\n\nb c d", "a\n\nb d"),
    ("red green\nblue white", "red green\nwhite"),
    ("  lead red green blue", "  lead red blue"),
    ("red green blue\n", "red green\n"),
    ("red green blue", "red green"),
    ("red green blue white", "red green white"),
    ("red, green, blue, white", "red, green, white"),
    ("red green blue, white", "red green, white"),
    ("x (alpha beta) gamma", "x (alpha) gamma"),
    ('he said "go away now" then', 'he said "go now" then'),
])
def test_blanks_line_breaks_and_closing_marks_stay_tidy(text: str, expected: str) -> None:
    assert remove_words(text, 3).text == expected


@pytest.mark.parametrize(("text", "expected"), [("red  green  blue  white", "red  green  white"), ("red\tgreen\tblue\twhite", "red\tgreen\twhite"), ("red green  blue", "red green")])
def test_wider_blanks_do_not_pile_up(text: str, expected: str) -> None:
    assert remove_words(text, 3).text == expected


@pytest.mark.parametrize("code", ["`red green blue white`", "```\nred green blue white black\n```", "```py\na b c d\ne f g\n```", "```\nnever closed a b c d e f"])
def test_code_stays_as_it_is(code: str) -> None:
    result = remove_words(f"please run the code {code}", 3)
    assert code in result.text
    assert result.removed == ("the",)


def test_code_in_the_middle_keeps_its_place_and_blanks() -> None:
    assert remove_words("first run `a b c d` then look at it", 3).text == "first run `a b c d` look at"


def test_word_glued_to_code_stays_or_leaves_a_blank() -> None:
    text = remove_words("call it foo`x y` now", 3).text
    assert text in ("call it foo`x y`", "call it foo`x y` now", "call it `x y` now")


@pytest.mark.parametrize("every", [0, 1, -3])
@pytest.mark.parametrize("text", [PLAIN, "", "  \n ", "`code`"])
def test_every_below_two_is_the_identity(every: int, text: str) -> None:
    assert remove_words(text, every) == RemovalResult(text, len(text.split()), ())


def test_short_texts_stay_whole() -> None:
    assert remove_words("red green blue white black", 3, minimum_words=6).text == "red green blue white black"
    assert remove_words("red green blue white black brown", 3, minimum_words=6).text == "red green white black"


@pytest.mark.parametrize("text", ["a!" + "!" * 20_000 + "a " * 6, "`" * 20_001 + " a b c d e f", "." * 20_000 + "a b c d e f", "a" * 50_000 + " b c d e f g", "\u00e9 " * 20_000])
def test_hostile_texts_take_no_long_time(text: str) -> None:
    began = time.process_time()
    remove_words(text, 3)
    assert time.process_time() - began < 2.0


# For any text.

WORDS = st.text(st.characters(blacklist_characters="`", blacklist_categories=("Cs", "Zs", "Zl", "Zp", "Cc")), min_size=1, max_size=8).filter(lambda w: len(w.split()) == 1 and w == w.strip())
COMMON = st.sampled_from(["the", "a", "word,", "London", "42", "not", "don't", "end.", "(open", "close)", "Next?", "I", "we's", "e.g.", "A1", "x=1", '"quote', 'quote"', "naïve", "so:", "NASA"])
TEXTS = st.lists(st.tuples(st.one_of(COMMON, WORDS), st.sampled_from([" ", " ", " ", "\n", "  ", "\t", "\n\n", " \n"])), max_size=40).map(lambda parts: "".join(w + s for w, s in parts))


@given(TEXTS, EVERY)
def test_kept_and_removed_words_account_for_the_text(text: str, every: int) -> None:
    result = remove_words(text, every)
    whole, left, removed = cores(text), cores(result.text), [core(word) for word in result.removed]
    assert result.words == len(text.split())
    assert sorted(left + removed) == sorted(whole)
    for part in (left, removed):  # both in the order of the text
        rest = iter(whole)
        assert all(word in rest for word in part)


@given(TEXTS, EVERY)
def test_removed_words_are_never_protected(text: str, every: int) -> None:
    for word in remove_words(text, every).removed:
        assert not is_protected(word, starts_sentence=True)
        assert core(word).lower().replace("\u2019", "'") not in NEGATIONS and not re.search(r"\d", word) and not ends_sentence(word)


@given(TEXTS, EVERY)
def test_no_more_than_every_nth_word_goes_and_counts_are_true(text: str, every: int) -> None:
    result = remove_words(text, every)
    assert len(result.removed) <= len(text.split()) // every
    assert len(result.text.split()) == result.words - len(result.removed)


@given(TEXTS, EVERY)
def test_line_breaks_stay(text: str, every: int) -> None:
    assert remove_words(text, every).text.count("\n") == text.count("\n")


@given(st.text(max_size=200), EVERY)
def test_any_string_is_taken_and_the_result_is_deterministic_and_no_longer(text: str, every: int) -> None:
    result = remove_words(text, every)
    assert remove_words(text, every) == result and len(result.text) <= len(text)
    assert set(result.text) <= set(text)


@given(st.text(max_size=200), st.integers(0, 1))
def test_any_string_passes_unchanged_at_zero(text: str, every: int) -> None:
    assert remove_words(text, every).text == text


@given(st.lists(st.tuples(TEXTS, st.text(st.characters(blacklist_characters="`\n", blacklist_categories=("Cs",)), max_size=12)), max_size=5), EVERY)
def test_code_spans_stay_whole_and_in_order(parts: list[tuple[str, str]], every: int) -> None:
    spans = [f"`{code}`" for _, code in parts]
    text = "".join(f"{words} {span} " for (words, _), span in zip(parts, spans, strict=True))
    left = remove_words(text, every).text
    place = 0
    for span in spans:
        place = left.index(span, place) + len(span)


# As a technique.


@pytest.mark.parametrize("every", [3, 4, 5])
def test_filter_drops_about_its_share_of_a_paragraph(every: int) -> None:
    text = " ".join(["machine learning systems learn patterns from many examples so that they can answer new questions well enough,"] * 9) + " fine"
    words, left = len(text.split()), len(WordRemoval(every=every)(text).split())
    assert 0.8 / every < (words - left) / words <= 1 / every


def test_technique_adds_itself_to_the_filters_and_leaves_the_model(llama: Bundle) -> None:
    llama.prompt_filters = (str.lower,)
    before = dict(llama.model.named_modules())
    technique = WordRemoval(every=3, minimum_words=0)
    with technique.apply(llama, technique.prepare(llama)) as applied:
        assert llama.prompt_filters == (str.lower, technique)
        assert llama.filter_prompt("RED GREEN BLUE WHITE") == "red green white"
        assert applied.report.touched == ("prompt_filters",) and applied.report.label is Label.EXECUTED
        assert (applied.report.bytes_before, applied.report.bytes_after) == (0, 0)
    assert llama.prompt_filters == (str.lower,) and dict(llama.model.named_modules()) == before


def test_prompt_tokens_are_fewer_and_both_counts_are_measured(llama: Bundle) -> None:
    messages = [{"role": "system", "content": PLAIN}, {"role": "user", "content": PLAIN}]
    plain = build_prompt(llama, messages)  # type: ignore[arg-type]
    technique = WordRemoval()
    with technique.apply(llama, technique.prepare(llama)):
        short = build_prompt(llama, messages)  # type: ignore[arg-type]
    assert short.unfiltered_tokens == plain.unfiltered_tokens == len(plain.ids) > len(short.ids)
    assert short.text.count("violet") == 1 and plain.text.count("violet") == 2  # only the user's words go
    assert len(short.ids) == len(llama.tokenizer(short.text, add_special_tokens=False)["input_ids"])


def test_logits_with_removal_are_those_of_the_shorter_text(llama: Bundle) -> None:
    import torch

    technique = WordRemoval(every=4)
    direct = contract.logits_of(llama, technique(contract.PROMPT))
    with technique.apply(llama, technique.prepare(llama)):
        assert torch.equal(contract.logits_of(llama), direct)


def test_filtering_is_the_same_at_every_turn_so_that_history_stays() -> None:
    filters: list[Callable[[str], str]] = [WordRemoval(every=3), WordRemoval(every=3)]
    assert filters[0](contract.PROMPT) == filters[1](contract.PROMPT) == filters[0](contract.PROMPT)
