"""Colours of figures: one style a method, the same in every figure, told apart by people with any colour vision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

from engines.methods import BASELINE

# Okabe-Ito without black and yellow.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
NEUTRAL = "#808793"  # readable on white and on black
_BLUE, _VERMILION, _GREEN, _PINK, _ORANGE, _SKY = range(6)
_HATCHES = ("", "////", "xxxx", "....", "\\\\\\\\", "----", "++++")
_PATTERNS = ("", "/", "x", ".", "\\", "-", "+")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖")
_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")

# Relatives share a colour and differ in the second channel: bitsandbytes beside our own form, each cache beside the other.
_KNOWN = {
    "larosa": (_VERMILION, 0), "int8": (_BLUE, 0), "int4": (_SKY, 0), "vattention": (_GREEN, 0), "native": (_ORANGE, 0), "word_removal": (_PINK, 0),
    "chai": (_VERMILION, 1), "bnb_int8": (_BLUE, 1), "bnb_nf4": (_SKY, 1), "hybrid_kv_cache": (_GREEN, 1), "mpo": (_ORANGE, 1), "adaptivocab": (_PINK, 1),
    "all_combined": (_PINK, 2),
}


@dataclass(frozen=True)
class MethodStyle:
    """A colour, and a second channel for bars (hatch, plotly's pattern) and points (marker, plotly's symbol)."""

    colour: str
    shape: int = 0

    @property
    def hatch(self) -> str:
        """matplotlib's hatch; empty for plain."""
        return _HATCHES[self.shape]

    @property
    def pattern(self) -> str:
        """plotly's pattern shape; empty for plain."""
        return _PATTERNS[self.shape]

    @property
    def marker(self) -> str:
        """matplotlib's marker."""
        return MARKERS[self.shape]

    @property
    def glyph(self) -> str:
        """The marker as a character."""
        return GLYPHS[self.shape]

    @property
    def symbol(self) -> str:
        """plotly's marker symbol."""
        return _SYMBOLS[self.shape]


BASELINE_STYLE = MethodStyle(NEUTRAL)


def _wanted_place(method: str) -> tuple[int, int]:
    """Colour and shape by name alone: the colour of the last technique of a combination, the shape by the whole spelling."""
    if method in _KNOWN:
        return _KNOWN[method]
    code = crc32(method.encode("utf-8", "replace"))
    last = method.rsplit("+", maxsplit=1)[-1].split(":", maxsplit=1)[0].strip()
    return _KNOWN.get(last, (code % len(PALETTE), 0))[0], 2 + code % (len(MARKERS) - 2)


def method_styles(methods: Iterable[str]) -> dict[str, MethodStyle]:
    """A style for each method. It depends on the name; only where two unnamed combinations want the same one, the later in the alphabet takes the next."""
    names = list(dict.fromkeys(methods))
    taken: set[tuple[int, int]] = {_KNOWN[m] for m in names if m in _KNOWN}
    out: dict[str, MethodStyle] = {}
    for name in sorted(names):
        if name == BASELINE:
            out[name] = BASELINE_STYLE
            continue
        colour, shape = _wanted_place(name)
        places = [(colour, 2 + (shape - 2 + step) % 5) for step in range(5)] + [(c, s) for s in range(7) for c in range(6)]
        place = (colour, shape) if name in _KNOWN else next((p for p in places if p not in taken), places[0])
        taken.add(place)
        out[name] = MethodStyle(PALETTE[place[0]], place[1])
    return {name: out[name] for name in names}
