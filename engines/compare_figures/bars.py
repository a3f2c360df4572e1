"""Bars of one metric: median with 10th to 90th percentile, the number beside it, the baseline as a line."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from engines.compare_figures.grid import Rows
from engines.compare_figures.scale import Scale, axis_limit, scale_of, short_title, unit_line
from engines.compare_view import ABSENT, ModelView, Spread, definition
from engines.figure_style.lettering import text_width
from engines.figure_style.palette import MethodStyle
from engines.figure_style.paper import INK, MUTED, PAPER, SMALL

NOTE = "Bar: median over answers. Thin line: 10th to 90th percentile (▸: it goes on). Dashed: the baseline, which is first; then the best."
_NUMBERS = 34.0  # points kept for the numbers at the right edge


@dataclass(frozen=True)
class Bars:
    """A panel of one metric."""

    metric: str

    def title(self, view: ModelView) -> str:
        """The metric's short title."""
        return short_title(self.metric, definition(view.record, self.metric)["title"])

    def unit(self, view: ModelView) -> str:
        """The unit and the better side."""
        return unit_line(self.scale(view).unit, definition(view.record, self.metric)["better"])

    def scale(self, view: ModelView) -> Scale:
        """One unit for all rows."""
        return scale_of([r.metrics[self.metric].median for r in view.rows if self.metric in r.metrics], definition(view.record, self.metric)["unit"])

    def draw(self, axes: Axes, rows: Rows) -> None:
        """A bar for each method that has the metric, words for each that has not."""
        scale = self.scale(rows.view)
        found = {m: s for m in rows.methods if (s := rows.view.spread(m, self.metric))}
        texts = {m: scale.text(s.median) for m, s in found.items()}
        kept = max([_NUMBERS, *(text_width(t, SMALL) + 4 for t in texts.values())])
        limit = axis_limit(list(found.values())) / scale.divisor
        full = limit * rows.width / max(12.0, rows.width - kept)
        axes.set_xlim(0, full)
        self._draw_baseline(axes, rows, scale)
        for y, method in enumerate(rows.methods):
            if method not in found:
                draw_absent(axes, rows, y, method)
                continue
            spread = found[method]
            draw_bar(axes, y, spread.median / scale.divisor, rows.styles[method])
            draw_spread(axes, y, spread, scale, limit)
            axes.text(full, y, texts[method], ha="right", va="center_baseline", fontsize=SMALL, color=INK)
        value_ticks(axes, limit, bool(found), rows.width - kept)

    def _draw_baseline(self, axes: Axes, rows: Rows, scale: Scale) -> None:
        base = rows.view.baseline
        if base and self.metric in base.metrics:
            axes.axvline(base.metrics[self.metric].median / scale.divisor, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)), zorder=3)


def draw_bar(axes: Axes, y: float, value: float, style: MethodStyle) -> None:
    """A horizontal bar in a method's colour and hatch."""
    axes.barh(y, value, height=0.62, color=style.colour, hatch=style.hatch, edgecolor=style.colour, hatchcolor="white", linewidth=0.4, zorder=2)


def draw_spread(axes: Axes, y: float, spread: Spread, scale: Scale, limit: float) -> None:
    """A line from the 10th to the 90th percentile; it ends in an arrow where it leaves the axis."""
    if spread.p10 is None or spread.p90 is None or spread.count == 1:
        return
    low, high = spread.p10 / scale.divisor, spread.p90 / scale.divisor
    axes.plot([min(low, limit), min(high, limit)], [y, y], color=INK, linewidth=0.9, solid_capstyle="butt", zorder=4)
    if high > limit * 1.001:
        axes.plot([limit], [y], marker=">", markersize=3.5, color=INK, linewidth=0, zorder=4)


def value_ticks(axes: Axes, limit: float, shown: bool, width: float) -> None:
    """Zero and the round numbers up to `limit` that `width` points have room for; none over an empty panel."""
    ticks = [t for t in MaxNLocator(nbins=max(1, min(6, int(width // 22))), steps=[1, 2, 2.5, 5, 10]).tick_values(0, limit) if 0 <= t <= limit * 1.001]
    axes.set_xticks(ticks if shown else [])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def draw_absent(axes: Axes, rows: Rows, y: float, method: str) -> None:
    """Words in a row that has no values: not measured, failed or waiting."""
    state = next(r.state for r in rows.view.rows if r.method == method)
    axes.text(0.0, y, ABSENT[state], va="center_baseline", fontsize=SMALL, color=MUTED, style="italic", transform=axes.get_yaxis_transform(), zorder=5, bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 0.5})
