"""Method names that fit beside bars: whole where they fit, else shortened, each still its own."""

from __future__ import annotations

from collections.abc import Sequence

from engines.figure_style.lettering import drawable, shorten, text_width
from engines.figure_style.paper import BODY

WIDEST = 98.0


def name_lines(methods: Sequence[str], size: float = BODY, widest: float = WIDEST) -> dict[str, list[str]]:
    """One or two lines for each method, broken after a plus, colon or comma where possible."""
    return {m: _lines(drawable(m), place, size, widest) for place, m in enumerate(methods, 1)}


def _lines(name: str, place: int, size: float, widest: float) -> list[str]:
    if text_width(name, size) <= widest:
        return [name]
    breaks = [n + 1 for n, c in enumerate(name) if c in "+:," and text_width(name[: n + 1], size) <= widest]
    cut = breaks[-1] if breaks else next(n for n in range(len(name), 0, -1) if text_width(name[:n], size) <= widest)
    rest = name[cut:]
    if text_width(rest, size) <= widest:
        return [name[:cut], rest]
    mark = f" [{place}]"  # two long names may begin alike
    return [name[:cut], shorten(rest, widest - text_width(mark, size), size) + mark]


def shortened(methods: Sequence[str]) -> list[str]:
    """A note for each name that did not fit, with the number it is shown with."""
    return [f"[{place}] {m}" for place, m in enumerate(methods, 1) if "".join(name_lines([m])[m]) != drawable(m)]
