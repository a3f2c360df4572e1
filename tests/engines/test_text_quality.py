"""Figures of texts, on texts whose figures can be counted by hand."""

from __future__ import annotations

import pytest

from engines.quality import of_text
from engines.text_quality import distinct_share, keyword_recall, rouge_l, words_of


def test_words_are_of_any_script() -> None:
    assert words_of("Don't: Wärme_2, И так!") == ["don", "t", "wärme", "2", "и", "так"]


def test_keyword_recall_finds_stems_of_long_words() -> None:
    assert keyword_recall("It makes a prediction from data.", ("predictions", "data", "rain")) == pytest.approx(2 / 3)
    assert keyword_recall("", ("data",)) == 0


@pytest.mark.parametrize(
    ("candidate", "reference", "f1"),
    [("the cat sat", "the cat sat", 1.0), ("the cat sat", "a dog ran", 0.0), ("the cat", "the big cat sat", 2 * 1 * 0.5 / 1.5), ("cat the", "the cat", 0.5), ("", "x", 0.0)],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(candidate: str, reference: str, f1: float) -> None:
    assert rouge_l(candidate, reference) == pytest.approx(f1)


def test_distinct_share_counts_different_runs() -> None:
    assert distinct_share("a b a b a", 2) == 2 / 4
    assert distinct_share("a b c d", 2) == 1
    assert distinct_share("a", 2) is None


def test_repetition_is_what_four_word_runs_lack() -> None:
    assert of_text("a b c d a b c d a b c d")["repetition_rate"] == pytest.approx(1 - 4 / 9)
    assert of_text("a b c d e f g")["repetition_rate"] == 0
    assert of_text("a b c") == {"keyword_recall": None, "distinct_2": 1, "repetition_rate": None}
    assert of_text("a b c", ("a", "z"))["keyword_recall"] == 0.5
