"""Decode speed against memory, sized by quality loss, the Pareto front marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from engines.compare_figures.grid import footing, heading, note_lines, subtitle
from engines.compare_figures.label_places import place_labels
from engines.compare_figures.scale import Scale, scale_of
from engines.compare_view import ModelView, failure_notes
from engines.figure_style.lettering import shorten, text_width, wrap_text
from engines.figure_style.palette import method_styles
from engines.figure_style.paper import BODY, GRID, INK, MARGIN, MUTED, PAPER, SMALL, TITLE, WIDTH, Sheet
from engines.pareto import Point, front, points

TALL, LEFT, _LABEL = 270.0, 40.0, 120.0
NOTE = (
    "Up and to the left is better. Size: quality lost, in bits per byte of the baseline's answer above the baseline's own. Ringed and bold: on the Pareto "
    "front, no method is at least as good in speed, memory and quality and better in one. Memory: weights in use + committed KV cache."
)


def marker_size(loss: float) -> float:
    """Area of a marker in square points: 26 without loss, growing with its root, 300 from half a bit on."""
    return 26 + 274 * math.sqrt(min(1.0, max(0.0, loss) / 0.5))


def pareto(view: ModelView) -> Figure:
    """Every method with speed, memory and quality; the others are named below with the reason."""
    found, missing = points(view)
    notes = note_lines([NOTE, *(f"{m}: not shown, {reason.rstrip('.')}." for m, reason in missing.items() if not reason.startswith("failed")), *failure_notes(view)])
    head = wrap_text(subtitle(view), WIDTH - 2 * MARGIN, SMALL)
    sheet = Sheet(MARGIN + 13 + 10 * len(head) + 8 + TALL + 48 + 26 + 10 * len(notes) + MARGIN)
    top = heading(sheet, wrap_text("Speed, memory and quality", WIDTH - 2 * MARGIN, TITLE, bold=True), head)
    sheet.text(MARGIN, top, "decode speed, tok/s", SMALL, MUTED)
    axes = sheet.axes(LEFT, top + 14, WIDTH - LEFT - MARGIN, TALL)
    memory = scale_of([p.memory_bytes for p in found], "bytes")
    _set_axes(axes, found, memory)
    sheet.text(WIDTH - MARGIN, top + 14 + TALL + 14, f"weights + KV cache, {memory.unit}", SMALL, MUTED, ha="right")
    if found:
        _draw(axes, view, found, memory)
        _draw_key(sheet, top + TALL + 48)
    else:
        axes.text(0.5, 0.5, "nothing to compare yet", transform=axes.transAxes, ha="center", fontsize=BODY, color=MUTED, style="italic")
    footing(sheet, top + TALL + 72, notes)
    return sheet.figure


def _set_axes(axes: Axes, found: Sequence[Point], memory: Scale) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    if not found:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    speeds, sizes = [p.speed_tok_s for p in found], [p.memory_bytes / memory.divisor for p in found]
    axes.set_xlim(0, max(sizes) * 1.22 or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if min(speeds) > 0 and max(speeds) > 5 * min(speeds):
        axes.set_yscale("log")
        axes.set_ylim(min(speeds) / 1.6, max(speeds) * 1.6)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    else:
        axes.set_ylim(0, max(speeds) * 1.18 or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _draw(axes: Axes, view: ModelView, found: Sequence[Point], memory: Scale) -> None:
    styles, best = method_styles(view.methods), {p.method for p in front(found)}
    base = next((p for p in found if p.method == "baseline"), None)
    if base:
        axes.axhline(base.speed_tok_s, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        axes.axvline(base.memory_bytes / memory.divisor, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
    places = {p.method: (p.memory_bytes / memory.divisor, p.speed_tok_s) for p in found}
    for p in sorted(found, key=lambda q: -q.loss_bits_per_byte):
        x, y = places[p.method]
        style, size, on_front = styles[p.method], marker_size(p.loss_bits_per_byte), p.method in best
        if on_front:
            axes.scatter([x], [y], s=(math.sqrt(size) + 5) ** 2, facecolors="none", edgecolors=INK, linewidths=1.2, marker=style.marker, zorder=3)
        axes.scatter([x], [y], s=size, color=style.colour, marker=style.marker, alpha=0.9 if on_front else 0.6, linewidths=0.6, edgecolors=PAPER, zorder=4)
    for method, (dx, dy) in _offsets(axes, found, places, best).items():
        axes.annotate(
            _label(method, best), places[method], (dx, dy), textcoords="offset points", fontsize=SMALL, color=INK if method in best else MUTED,
            weight="bold" if method in best else "normal", ha="left", va="center_baseline", zorder=5, bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.4},
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 2} if abs(dy) > 14 else None,
        )


def _offsets(axes: Axes, found: Sequence[Point], places: Mapping[str, tuple[float, float]], best: set[str]) -> dict[str, tuple[float, float]]:
    """Where each name goes, in points from its marker; names on the front choose first."""
    scale = 72 / axes.figure.dpi
    ranked = sorted(found, key=lambda q: (q.method not in best, -q.speed_tok_s))
    at = {p.method: (float(x) * scale, float(y) * scale) for p in ranked for x, y in [axes.transData.transform(places[p.method])]}
    radii = {p.method: math.sqrt(marker_size(p.loss_bits_per_byte)) / 2 + (3.5 if p.method in best else 1) for p in ranked}
    widths = {p.method: text_width(_label(p.method, best), SMALL, p.method in best) + 2 for p in ranked}
    frame = axes.get_window_extent()
    return place_labels(at, radii, widths, (frame.x0 * scale, frame.y0 * scale, frame.x1 * scale, frame.y1 * scale))


def _label(method: str, best: set[str]) -> str:
    return shorten(method, _LABEL, SMALL, method in best)


def _draw_key(sheet: Sheet, top: float) -> None:
    """Three sizes with their losses."""
    axes = sheet.axes(MARGIN, top, WIDTH - 2 * MARGIN, 20)
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlim(0, WIDTH - 2 * MARGIN)
    axes.set_ylim(-1, 1)
    axes.text(0, 0, "bits per byte lost:", va="center_baseline", fontsize=SMALL, color=MUTED)
    left = 90.0
    for loss, text in ((0.0, "0"), (0.05, "0.05"), (0.2, "0.2"), (0.5, "0.5 or more")):
        axes.scatter([left], [0], s=marker_size(loss), color=MUTED, alpha=0.5, linewidths=0)
        axes.text(left + 12, 0, text, va="center_baseline", fontsize=SMALL, color=MUTED)
        left += 50
