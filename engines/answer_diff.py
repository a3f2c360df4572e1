"""Where two answers differ, word by word."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

_PIECES = re.compile(r"\s+|[^\s]+")
LONGEST = 4000  # words and blanks; difflib is quadratic


@dataclass(frozen=True)
class Piece:
    """A stretch of text. `kind`: same, removed (only in the first answer), added (only in the second), or unmarked (beyond what is compared)."""

    kind: str
    text: str


def differences(first: str, second: str) -> Iterator[Piece]:
    """The second answer's text in order, with what only the first has at its place."""
    old, new = _PIECES.findall(first), _PIECES.findall(second)
    rest = "".join(new[LONGEST:])
    old, new = old[:LONGEST], new[:LONGEST]
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            yield Piece("same", "".join(new[c:d]))
            continue
        if b > a:
            yield Piece("removed", "".join(old[a:b]))
        if d > c:
            yield Piece("added", "".join(new[c:d]))
    if rest:
        yield Piece("unmarked", rest)


def marked_html(first: str, second: str) -> str:
    """The second answer as HTML, everything escaped: what it leaves out struck through, what is new underlined."""
    tags = {"removed": "del", "added": "ins"}
    out = []
    for piece in differences(first, second):
        text = escape(piece.text, quote=True)
        tag = tags.get(piece.kind)
        out.append(f"<{tag}>{text}</{tag}>" if tag else text)
    return "".join(out)
