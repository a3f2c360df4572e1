"""All methods in one table of figures, shaded by how far each is from the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from engines.compare_figures.grid import Rows, panel_grid
from engines.compare_figures.scale import Scale, scale_of
from engines.compare_view import ABSENT, ModelView, definition
from engines.figure_style.lettering import text_width
from engines.figure_style.palette import PALETTE
from engines.figure_style.paper import INK, MUTED, SMALL

COLUMNS = {
    "ttft_s": ("First", "token"), "decode_tok_s": ("", "Decode"), "weights_in_use_bytes": ("", "Weights"), "kv_committed_bytes": ("KV", "cache"),
    "baseline_answer_bits_per_byte": ("Bits per", "byte"), "agreement_share": ("Agree-", "ment"), "keyword_recall": ("Key-", "words"),
}
BETTER, WORSE = PALETTE[0], PALETTE[1]
_FULL_FACTOR, _FULL_DIFFERENCE = 4.0, 0.5
_CELL = 7.0
NOTE = (
    "Medians over answers. Blue: better than the baseline, orange: worse; full colour at 4 times, and for bits per byte, agreement and "
    "keywords at a difference of 0.5. ▴ and ▾ say the same without colour."
)


def shade(value: float, base: float | None, unit: str, better: str | None) -> float:
    """How much better than the baseline, -1 (worse) to 1: by factor, for shares and bits per byte by difference; 0 where nothing can be said."""
    if base is None or better is None:
        return 0.0
    sign = 1 if better == "high" else -1
    if unit in ("share", "bits/byte"):
        return max(-1.0, min(1.0, sign * (value - base) / _FULL_DIFFERENCE))
    if value <= 0 or base <= 0:
        return 0.0
    return max(-1.0, min(1.0, sign * math.log(value / base) / math.log(_FULL_FACTOR)))


@dataclass(frozen=True)
class Table:
    """A panel whose columns are metrics."""

    def title(self, view: ModelView) -> str:
        """Column heads are drawn with the cells."""
        return ""

    def unit(self, view: ModelView) -> str:
        """Units stand in the column heads."""
        return ""

    def draw(self, axes: Axes, rows: Rows) -> None:
        """A cell for each method and metric."""
        axes.grid(False)
        axes.set_xlim(0, len(COLUMNS))
        axes.set_xticks([])
        for x, (metric, title) in enumerate(COLUMNS.items()):
            meta = definition(rows.view.record, metric)
            scale = scale_of([r.metrics[metric].median for r in rows.view.rows if metric in r.metrics], meta["unit"])
            _draw_head(axes, x, (*title, "" if scale.unit == "bits/byte" else scale.unit), rows.width / len(COLUMNS))
            for y, method in enumerate(rows.methods):
                self._draw_cell(axes, rows, x, y, method, metric, scale)

    def _draw_cell(self, axes: Axes, rows: Rows, x: int, y: int, method: str, metric: str, scale: Scale) -> None:
        found, state = rows.view.spread(method, metric), next(r.state for r in rows.view.rows if r.method == method)
        if found is None:
            if state == "measured":
                axes.text(x + 0.8, y, "n. m.", ha="right", va="center_baseline", fontsize=_CELL, color=MUTED, style="italic")
            elif x == 0:
                axes.text(0.1, y, ABSENT[state], va="center_baseline", fontsize=SMALL, color=MUTED, style="italic")
            return
        meta, base = definition(rows.view.record, metric), rows.view.spread("baseline", metric)
        tone = shade(found.median, base.median if base else None, meta["unit"], meta["better"])
        if abs(tone) >= 0.02:
            axes.add_patch(Rectangle((x + 0.03, y - 0.45), 0.94, 0.9, color=BETTER if tone > 0 else WORSE, alpha=0.08 + 0.42 * abs(tone), linewidth=0))
        mark = "▴" if tone >= 0.02 else "▾" if tone <= -0.02 else ""
        axes.text(x + 0.8, y, scale.text(found.median), ha="right", va="center_baseline", fontsize=_CELL, color=INK)
        axes.text(x + 0.89, y, mark, ha="center", va="center_baseline", fontsize=5.5, color=INK)


def _draw_head(axes: Axes, x: int, lines: Sequence[str], width: float) -> None:
    """Two lines of title and one of unit over a column, each small enough for it."""
    for place, text in enumerate(lines):
        size, is_unit = min(_CELL, _CELL * (width - 2) / (text_width(text, _CELL) or 1)), place == 2
        axes.annotate(
            text, (x + 0.8, 1), (0, 23 - 9 * place), xycoords=("data", "axes fraction"), textcoords="offset points", ha="right", va="baseline", fontsize=size,
            color=MUTED if is_unit else INK,
        )


def all_methods(view: ModelView) -> Figure:
    """What each method buys and costs, at a glance."""
    return panel_grid(view, "All methods", [[Table()]], view.sorted_methods("decode_tok_s"), [NOTE, "n. m.: not measured."])
