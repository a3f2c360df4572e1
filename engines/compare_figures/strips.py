"""Panels of distributions: every answer a point, or every gap between tokens in one box."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from engines.compare_figures.bars import draw_absent, value_ticks
from engines.compare_figures.grid import Rows
from engines.compare_figures.scale import Scale, scale_of, short_title
from engines.compare_view import ModelView, definition, number
from engines.figure_style.paper import INK, MUTED, PAPER
from engines.metrics import percentile

_BANDS = 7  # heights among which points of one row are spread


@dataclass(frozen=True)
class Points:
    """A point for each value of a metric, one row a method, a bar at the median.

    limit: a line at this value, for example the longest answer allowed.
    per_query: one point a query (median of its repeats) instead of one an answer.
    """

    metric: str
    limit: float | None = None
    per_query: bool = False

    def title(self, view: ModelView) -> str:
        """The metric, and what a point is."""
        return short_title(self.metric, definition(view.record, self.metric)["title"]) + (", by query" if self.per_query else "")

    def unit(self, view: ModelView) -> str:
        """The unit, and what a point is."""
        return f"{self.scale(view).unit}; a point is a {'query, median of its repeats' if self.per_query else 'single answer'}"

    def values(self, view: ModelView, method: str) -> list[float]:
        """What is drawn in a method's row."""
        if not self.per_query:
            return view.values(method, self.metric)
        found = (percentile(view.values(method, self.metric, str(q.get("id"))), 0.5) for q in view.queries)
        return [v for v in found if v is not None]

    def scale(self, view: ModelView) -> Scale:
        """One unit for all rows."""
        return scale_of([v for m in view.methods for v in self.values(view, m)], definition(view.record, self.metric)["unit"])

    def draw(self, axes: Axes, rows: Rows) -> None:
        """Points in bands, so that equal values stay apart; the median a short line."""
        scale = self.scale(rows.view)
        drawn = {m: [v / scale.divisor for v in self.values(rows.view, m)] for m in rows.methods}
        highest = max([*(v for values in drawn.values() for v in values), (self.limit or 0) / scale.divisor]) or 1.0
        axes.set_xlim(0, highest * 1.04)
        if self.limit is not None:
            axes.axvline(self.limit / scale.divisor, color=MUTED, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1)
        for y, method in enumerate(rows.methods):
            values, style = drawn[method], rows.styles[method]
            if not values:
                draw_absent(axes, rows, y, method)
                continue
            heights = [y + 0.26 * (2 * (place * 3 % _BANDS) / (_BANDS - 1) - 1) for place in range(len(values))]
            axes.scatter(values, heights, s=13, color=style.colour, marker=style.marker, alpha=0.75, linewidths=0.4, edgecolors=PAPER, zorder=3)
            middle = statistics.median(values)
            axes.plot([middle, middle], [y - 0.36, y + 0.36], color=INK, linewidth=1.4, solid_capstyle="butt", zorder=4)
        value_ticks(axes, highest, any(drawn.values()), rows.width)


@dataclass(frozen=True)
class Gaps:
    """Times between tokens of all of a method's answers: 10th to 90th percentile as a bar, median, and the line to the 99th."""

    def title(self, view: ModelView) -> str:
        """What is shown."""
        return "Time between two tokens"

    def unit(self, view: ModelView) -> str:
        """The unit, and how to read it."""
        return "ms, logarithmic; bar p10 to p90, tick median, line to p99"

    def gaps_s(self, view: ModelView, method: str) -> list[float]:
        """All gaps of a method's answers, in seconds."""
        found = (number(g) for c in view.cells_of(method) for g in c.get("token_gaps_s") or ())
        return [g for g in found if g is not None and g > 0]

    def draw(self, axes: Axes, rows: Rows) -> None:
        """A box for each method that answered with two tokens or more."""
        gaps = {m: [1e3 * g for g in self.gaps_s(rows.view, m)] for m in rows.methods}
        marks = {m: [p for q in (0.1, 0.5, 0.9, 0.99) if (p := percentile(g, q)) is not None] for m, g in gaps.items() if g}
        for y, method in enumerate(rows.methods):
            if method not in marks:
                draw_absent(axes, rows, y, method)
                continue
            low, middle, high, last = marks[method]
            style = rows.styles[method]
            axes.plot([low, last], [y, y], color=style.colour, linewidth=1.1, zorder=2)
            axes.barh(y, high - low, left=low, height=0.5, color=style.colour, hatch=style.hatch, edgecolor=style.colour, hatchcolor="white", linewidth=0.4, zorder=3)
            axes.plot([middle, middle], [y - 0.36, y + 0.36], color=INK, linewidth=1.4, solid_capstyle="butt", zorder=4)
        if marks:
            log_axis(axes, min(m[0] for m in marks.values()), max(m[-1] for m in marks.values()))
        else:
            axes.set_xticks([])


def log_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic x axis around what is drawn, labelled at 1, 2 and 5 of each power of ten as far as there is room."""
    axes.set_xscale("log")
    axes.set_xlim(low / 1.15, high * 1.15)
    decades = high / low
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 400 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
