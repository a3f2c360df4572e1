"""Figures inside a page: SVG whose ink follows the page's light or dark mode."""

from __future__ import annotations

import io
import re
from html import escape

import matplotlib as mpl
from matplotlib.figure import Figure

from engines.figure_style.paper import GRID, INK, MUTED, PAPER, RC

_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}
_COLOUR = re.compile("|".join(_VARIABLES), re.IGNORECASE)
_ID = re.compile(r'(\bid="|url\(#|href="#)')
_FONTS = "'DejaVu Sans', Verdana, system-ui, sans-serif"  # Verdana has the same widths


def inline_svg(figure: Figure, prefix: str, label: str) -> str:
    """A figure as an <svg> element: as wide as its place, texts as text, ids with a prefix so that two figures of a page do not share any."""
    out = io.StringIO()
    with mpl.rc_context({**RC, "svg.hashsalt": prefix}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    rest = _ID.sub(rf"\g<1>{prefix}-", _COLOUR.sub(lambda m: _VARIABLES[m.group(0).lower()], _styled(rest)))
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box.group(0) if box else ""} role="img" aria-label="{escape(label, quote=True)}">{rest.strip()}'


def _styled(svg: str) -> str:
    return svg.replace("'DejaVu Sans'", _FONTS)
