"""The look of matplotlib figures: a sheet as wide as a phone, laid out in points from the top."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from core.files import write_bytes
from engines.figure_style.lettering import FAMILY, drawable

WIDTH = 331.0  # points; on a phone 360 pixels wide a point is a pixel and a bit
MARGIN = 8.0
INK, MUTED, GRID, PAPER = "#1b2430", "#5b6573", "#d9dee5", "#ffffff"
TITLE, BODY, SMALL = 10.5, 8.5, 7.5
DPI = 220
# Texts come from people and models: a dollar sign in them is a dollar sign.
RC: Any = {"text.parse_math": False, "font.family": FAMILY, "font.size": BODY, "svg.fonttype": "none", "text.hinting": "none", "hatch.linewidth": 0.8, "axes.unicode_minus": False}


class Sheet:
    """A figure of fixed width. Places are points from its left and upper edge."""

    def __init__(self, height: float, dpi: int = DPI) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=dpi, facecolor=PAPER)
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes with a light grid across the values and no frame."""
        axes = self.figure.add_axes((left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height))
        axes.set_facecolor("none")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=SMALL, labelcolor=MUTED, pad=2)
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        return axes

    def text(self, left: float, top: float, text: str, size: float = BODY, colour: str = INK, **how: Any) -> None:
        """One line of text; `top` is its upper edge unless `va` says otherwise."""
        self.figure.text(left / WIDTH, 1 - top / self.height, drawable(text), fontsize=size, color=colour, **{"va": "top", **how})

    def bar(self, left: float, top: float, width: float, height: float, colour: str) -> None:
        """A filled rectangle."""
        self.figure.add_artist(Rectangle((left / WIDTH, 1 - (top + height) / self.height), width / WIDTH, height / self.height, color=colour, linewidth=0))

    def line(self, left: float, top: float, right: float, colour: str = GRID, width: float = 0.6) -> None:
        """A horizontal line."""
        y = 1 - top / self.height
        self.figure.add_artist(Line2D([left / WIDTH, right / WIDTH], [y, y], color=colour, linewidth=width, solid_capstyle="butt"))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all; the ending of `path` says the format."""
    data = io.BytesIO()
    with mpl.rc_context(RC):
        figure.savefig(data, format=path.suffix.lstrip(".") or "png")
    write_bytes(path, data.getvalue())
