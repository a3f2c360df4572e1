"""Methods on several models: does a gain on one carry over to the next?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engines.compare_figures.bars import draw_absent, value_ticks
from engines.compare_figures.grid import Rows, panel_grid
from engines.compare_figures.scale import Scale, scale_of, short_title, unit_line
from engines.compare_figures.strips import log_axis
from engines.compare_view import ModelView, definition
from engines.figure_style.lettering import shorten
from engines.figure_style.palette import GLYPHS, MARKERS
from engines.figure_style.paper import INK, MARGIN, SMALL, WIDTH

METRICS_SHOWN = ("decode_tok_s", "weights_in_use_bytes", "agreement_share")


@dataclass(frozen=True)
class ByModel:
    """A panel of one metric: a marker for each model in a method's row."""

    metric: str
    views: tuple[ModelView, ...]

    def title(self, view: ModelView) -> str:
        """The metric's short title."""
        return short_title(self.metric, definition(view.record, self.metric)["title"])

    def unit(self, view: ModelView) -> str:
        """The unit and the better side."""
        words = "logarithmic" if self.logarithmic() else ""
        return unit_line(", ".join(w for w in (self.scale().unit, words) if w), definition(view.record, self.metric)["better"])

    def medians(self) -> list[float]:
        """All values of the panel."""
        return [r.metrics[self.metric].median for v in self.views for r in v.rows if self.metric in r.metrics]

    def logarithmic(self) -> bool:
        """Models differ by factors; shares and zeros are drawn on a plain axis."""
        found = self.medians()
        return bool(found) and min(found) > 0 and max(found) > 4 * min(found) and definition(self.views[0].record, self.metric)["unit"] != "share"

    def scale(self) -> Scale:
        """One unit for all models."""
        return scale_of(self.medians(), definition(self.views[0].record, self.metric)["unit"])

    def draw(self, axes: Axes, rows: Rows) -> None:
        """A marker and its spread for each model that has the metric; models apart in height."""
        scale, step = self.scale(), 0.5 / max(1, len(self.views) - 1)
        for y, method in enumerate(rows.methods):
            found = [(n, s) for n, v in enumerate(self.views) if (s := v.spread(method, self.metric))]
            if not found:
                draw_absent(axes, rows, y, method)
            for n, spread in found:
                height = y + (n * step - 0.25 if len(self.views) > 1 else 0.0)
                colour = rows.styles[method].colour
                if spread.p10 is not None and spread.p90 is not None:
                    axes.plot([spread.p10 / scale.divisor, spread.p90 / scale.divisor], [height, height], color=colour, linewidth=0.9, zorder=2)
                axes.scatter([spread.median / scale.divisor], [height], s=20, color=colour, marker=MARKERS[n % len(MARKERS)], linewidths=0.5, edgecolors=INK, zorder=3)
        self._set_axis(axes, scale, rows.width)

    def _set_axis(self, axes: Axes, scale: Scale, width: float) -> None:
        spreads = [r.metrics[self.metric] for v in self.views for r in v.rows if self.metric in r.metrics]
        low = min((s.median if s.p10 is None else min(s.p10, s.median) for s in spreads), default=0.0) / scale.divisor
        high = max((s.highest for s in spreads), default=1.0) / scale.divisor
        if self.logarithmic() and low > 0:
            log_axis(axes, low, high)
            return
        axes.set_xlim(0, (high or 1.0) * 1.06)
        value_ticks(axes, high or 1.0, bool(spreads), width)


def cross_model(views: Sequence[ModelView]) -> Figure:
    """Speed, memory and agreement of every method on every model."""
    first = views[0]
    key = [f"{GLYPHS[n % len(GLYPHS)]} {v.model_id}" for n, v in enumerate(views)]
    notes = ["Marker: median over answers; line: 10th to 90th percentile."]
    panels = [[ByModel(m, tuple(views))] for m in METRICS_SHOWN]
    return panel_grid(first, "Methods across models", panels, first.sorted_methods("decode_tok_s"), notes, "   ".join(shorten(k, WIDTH - 2 * MARGIN, SMALL) for k in key))
