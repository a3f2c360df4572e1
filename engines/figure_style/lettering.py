"""How wide text is in matplotlib's own font, and how it wraps: layouts are computed in points, not tried."""

from __future__ import annotations

import unicodedata
from functools import cache

from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ft2font import LoadFlags

FAMILY = "DejaVu Sans"  # comes with matplotlib
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_UNITS = 100.0


@cache
def _advance(character: str, bold: bool) -> float:
    """Width of a character at size 1, in points."""
    font = get_font(findfont(FontProperties(family=FAMILY, weight="bold" if bold else "normal")))
    font.set_size(_UNITS, 72)
    return float(font.load_char(ord(character), LoadFlags.NO_HINTING).linearHoriAdvance) / 65536 / _UNITS


@cache
def _is_drawn(character: str) -> bool:
    return bool(get_font(findfont(FontProperties(family=FAMILY))).get_char_index(ord(character)))


def drawable(text: str) -> str:
    """`text` with what the font cannot draw, and control characters, shown as the replacement character; line ends and tabs become blanks."""
    out = []
    for character in text:
        if character.isspace():
            out.append(" ")
        elif unicodedata.category(character)[0] == "C" or not _is_drawn(character):
            out.append(UNKNOWN)
        else:
            out.append(character)
    return "".join(out)


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width in points of drawable text on one line."""
    return size * sum(_advance(c, bold) for c in text)


def wrap_text(text: str, width: float, size: float, bold: bool = False) -> list[str]:
    """Lines of at most `width` points; a word longer than a line is broken."""
    lines, line = [], ""
    for word in drawable(text).split():
        longer = f"{line} {word}" if line else word
        if text_width(longer, size, bold) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        line = word
        while text_width(line, size, bold) > width and len(line) > 1:
            fits = max(1, next((n for n in range(len(line), 0, -1) if text_width(line[:n], size, bold) <= width), 1))
            lines.append(line[:fits])
            line = line[fits:]
    return [*lines, line] if line else lines


def shorten(text: str, width: float, size: float, bold: bool = False) -> str:
    """`text` cut to `width` points, with an ellipsis where something was cut."""
    text = drawable(text)
    if text_width(text, size, bold) <= width:
        return text
    while text and text_width(text + "…", size, bold) > width:
        text = text[:-1]
    return text.rstrip() + "…"
