"""Bars of one metric: median with 10th to 90th percentile, the number beside it, the baseline as a line."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from engines.compare_figures.grid import Rows
from engines.compare_figures.scale import Scale, better_text, scale_of, short_title
from engines.compare_view import ModelView, definition
from engines.figure_style.lettering import text_width
from engines.figure_style.palette import MethodStyle
from engines.figure_style.paper import INK, MUTED, SMALL

NOTE = "Bar: median over answers. Thin line: 10th to 90th percentile. Dashed line: the baseline. The baseline is first, then the best."
ABSENT = {"measured": "not measured", "failed": "failed", "waiting": "waiting"}
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
        return "  ".join(p for p in (self.scale(view).unit, better_text(definition(view.record, self.metric)["better"])) if p)

    def scale(self, view: ModelView) -> Scale:
        """One unit for all rows."""
        return scale_of([r.metrics[self.metric].median for r in view.rows if self.metric in r.metrics], definition(view.record, self.metric)["unit"])

    def draw(self, axes: Axes, rows: Rows) -> None:
        """A bar for each method that has the metric, words for each that has not."""
        scale = self.scale(rows.view)
        found = {m: s for m in rows.methods if (s := rows.view.spread(m, self.metric))}
        texts = {m: scale.text(s.median) for m, s in found.items()}
        kept = max([_NUMBERS, *(text_width(t, SMALL) + 4 for t in texts.values())])
        limit = max((s.highest / scale.divisor for s in found.values()), default=0.0) or 1.0
        full = limit * rows.width / max(12.0, rows.width - kept)
        axes.set_xlim(0, full)
        self._draw_baseline(axes, rows, scale)
        for y, method in enumerate(rows.methods):
            if method not in found:
                draw_absent(axes, rows, y, method)
                continue
            spread = found[method]
            draw_bar(axes, y, spread.median / scale.divisor, rows.styles[method])
            if spread.p10 is not None and spread.p90 is not None and spread.count != 1:
                axes.plot([spread.p10 / scale.divisor, spread.p90 / scale.divisor], [y, y], color=INK, linewidth=0.9, solid_capstyle="butt", zorder=4)
            axes.text(full, y, texts[method], ha="right", va="center_baseline", fontsize=SMALL, color=INK)
        value_ticks(axes, limit, bool(found))

    def _draw_baseline(self, axes: Axes, rows: Rows, scale: Scale) -> None:
        base = rows.view.baseline
        if base and self.metric in base.metrics:
            axes.axvline(base.metrics[self.metric].median / scale.divisor, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)), zorder=3)


def draw_bar(axes: Axes, y: float, value: float, style: MethodStyle) -> None:
    """A horizontal bar in a method's colour and hatch."""
    axes.barh(y, value, height=0.62, color=style.colour, hatch=style.hatch, edgecolor=style.colour, hatchcolor="white", linewidth=0.4, zorder=2)


def value_ticks(axes: Axes, limit: float, shown: bool) -> None:
    """Zero and one or two round numbers up to `limit`; none over an empty panel."""
    ticks = [t for t in MaxNLocator(nbins=3, steps=[1, 2, 2.5, 5, 10]).tick_values(0, limit) if 0 <= t <= limit * 1.001]
    axes.set_xticks(ticks if shown else [])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def draw_absent(axes: Axes, rows: Rows, y: float, method: str) -> None:
    """Words in a row that has no values: not measured, failed or waiting."""
    state = next(r.state for r in rows.view.rows if r.method == method)
    axes.text(0.0, y, ABSENT[state], va="center_baseline", fontsize=SMALL, color=MUTED, style="italic", transform=axes.get_yaxis_transform())
