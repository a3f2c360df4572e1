"""Differences of two answers."""

from __future__ import annotations

from html import unescape
from re import sub

from hypothesis import given
from hypothesis import strategies as st

from engines import answer_diff
from engines.answer_diff import Piece, differences, marked_html

TEXT = st.text(st.sampled_from("ab <>&\n"), max_size=40)


def test_pieces_name_what_is_the_same_removed_and_added() -> None:
    assert list(differences("one two three", "one four three")) == [Piece("same", "one "), Piece("removed", "two"), Piece("added", "four"), Piece("same", " three")]


@given(TEXT, TEXT)
def test_both_answers_can_be_read_back_from_the_pieces(first: str, second: str) -> None:
    pieces = list(differences(first, second))
    assert "".join(p.text for p in pieces if p.kind != "removed") == second
    assert "".join(p.text for p in pieces if p.kind != "added") == first


@given(TEXT, TEXT)
def test_html_holds_the_second_answer_escaped(first: str, second: str) -> None:
    html = sub(r"<del>.*?</del>", "", marked_html(first, second), flags=16)
    assert unescape(sub(r"</?ins>", "", html)) == second


def test_what_is_too_long_to_compare_is_kept_and_not_marked(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(answer_diff, "LONGEST", 3)
    assert list(differences("a b", "a b c d")) == [Piece("same", "a b"), Piece("unmarked", " c d")]
