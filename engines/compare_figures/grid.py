"""Panels that share their rows: a method's name on the left, its values beside it in every panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engines.compare_figures.names import name_lines, shortened
from engines.compare_view import ModelView, failure_notes
from engines.figure_style.lettering import shorten, text_width, wrap_text
from engines.figure_style.palette import MethodStyle, method_styles
from engines.figure_style.paper import BODY, GRID, INK, MARGIN, MUTED, SMALL, TITLE, WIDTH, Sheet

ROW, TALL_ROW, HEAD, FOOT, GAP = 14.0, 21.0, 27.0, 13.0, 10.0
_LINE = 10.0
_MOST_NOTE_LINES = 5


@dataclass(frozen=True)
class Rows:
    """What a panel draws into: the methods from top to bottom (y = 0, 1, ...), their styles, and its width in points."""

    view: ModelView
    methods: tuple[str, ...]
    styles: dict[str, MethodStyle]
    width: float


class Panel(Protocol):
    """A part of a figure over the shared rows."""

    def title(self, view: ModelView) -> str:
        """What is shown."""

    def unit(self, view: ModelView) -> str:
        """In which unit, and which side is better."""

    def draw(self, axes: Axes, rows: Rows) -> None:
        """Draw every row."""


def subtitle(view: ModelView) -> str:
    """Model, number format, queries, repeats and device, as far as the record says."""
    settings = view.record.get("settings") or {}
    count, repeats = len(view.queries), settings.get("repeats")
    asked = f"{count} {'query' if count == 1 else 'queries'}" + (f" × {repeats}" if repeats and repeats != 1 else "")
    parts = [view.model_id, view.model.get("dtype"), asked, settings.get("device"), view.record.get("date")]
    return " · ".join(str(p) for p in parts if p) + ("" if view.record.get("complete", True) else " · unfinished")


@dataclass(frozen=True)
class _Plan:
    """Heights and places of a sheet, in points."""

    title: list[str]
    subtitle: list[str]
    notes: list[str]
    row: float
    names: float

    def head_height(self) -> float:
        return MARGIN + 13 * len(self.title) + _LINE * len(self.subtitle) + 8


def heading(sheet: Sheet, title: Sequence[str], below: Sequence[str]) -> float:
    """Draw title and subtitle; returns where the next thing may begin."""
    top = MARGIN
    for line in title:
        sheet.text(MARGIN, top, line, TITLE, weight="bold")
        top += 13
    for line in below:
        sheet.text(MARGIN, top + 1, line, SMALL, MUTED)
        top += _LINE
    return top + 8


def footing(sheet: Sheet, top: float, notes: Sequence[str]) -> None:
    """Draw notes, one line each."""
    for line in notes:
        sheet.text(MARGIN, top, line, SMALL, MUTED)
        top += _LINE


def note_lines(notes: Sequence[str], most: int = _MOST_NOTE_LINES) -> list[str]:
    """Notes wrapped to the sheet, each cut after `most` lines."""
    out = []
    for note in notes:
        lines = wrap_text(note, WIDTH - 2 * MARGIN, SMALL)
        out += lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][:-1] + "…"]
    return out


def panel_grid(view: ModelView, title: str, panels: Sequence[Sequence[Panel]], methods: Sequence[str], notes: Sequence[str], below: str | None = None) -> Figure:
    """A figure of panels, given row by row, over the same methods from top to bottom; `below` stands under the title."""
    methods = tuple(methods)
    names = name_lines(methods)
    row = TALL_ROW if any(len(n) > 1 for n in names.values()) else ROW
    widest = max((text_width(line, BODY) for n in names.values() for line in n), default=0.0)
    plan = _Plan(
        wrap_text(title, WIDTH - 2 * MARGIN, TITLE, bold=True), wrap_text(subtitle(view) if below is None else below, WIDTH - 2 * MARGIN, SMALL),
        note_lines([*notes, *shortened(methods), *failure_notes(view)]), row, widest + 12,
    )
    block = HEAD + row * max(1, len(methods)) + FOOT
    height = plan.head_height() + len(panels) * (block + GAP) + _LINE * len(plan.notes) + MARGIN
    sheet = Sheet(height)
    top = heading(sheet, plan.title, plan.subtitle)
    styles = method_styles(view.methods)
    for group in panels:
        _draw_block(sheet, top, plan, group, Rows(view, methods, styles, 0.0), names)
        top += block + GAP
    footing(sheet, top - 2, plan.notes)
    return sheet.figure


def _draw_block(sheet: Sheet, top: float, plan: _Plan, group: Sequence[Panel], rows: Rows, names: dict[str, list[str]]) -> None:
    left = MARGIN + plan.names
    width = (WIDTH - MARGIN - left - GAP * (len(group) - 1)) / len(group)
    tall = plan.row * max(1, len(rows.methods))
    for place, method in enumerate(rows.methods):
        middle = top + HEAD + plan.row * (place + 0.5)
        _draw_name(sheet, left - 6, middle, names[method], rows.view, method)
        if place:
            sheet.line(MARGIN, top + HEAD + plan.row * place, WIDTH - MARGIN, GRID, 0.3)
    for place, panel in enumerate(group):
        start = left + place * (width + GAP)
        _draw_panel_head(sheet, start, top, width, panel, rows.view)
        axes = sheet.axes(start, top + HEAD, width, tall)
        axes.set_ylim(len(rows.methods) - 0.5, -0.5)
        axes.set_yticks([])
        panel.draw(axes, Rows(rows.view, rows.methods, rows.styles, width))


def _draw_panel_head(sheet: Sheet, left: float, top: float, width: float, panel: Panel, view: ModelView) -> None:
    """Title and unit, made to fit: a smaller title, an arrow without its word, a shorter unit."""
    title, unit = panel.title(view), panel.unit(view)
    sheet.text(left, top, title, min(BODY, BODY * width / (text_width(title, BODY, bold=True) or 1)), weight="bold")
    for long, short in (("◂ better", "◂"), ("better ▸", "▸"), ("thousand ", "k ")):
        unit = unit if text_width(unit, SMALL) <= width else unit.replace(long, short)
    sheet.text(left, top + 12, shorten(unit, width + 4, SMALL), SMALL, MUTED)


def _draw_name(sheet: Sheet, right: float, middle: float, lines: Sequence[str], view: ModelView, method: str) -> None:
    state = next(r.state for r in view.rows if r.method == method)
    for number, line in enumerate(lines):
        offset = (number - (len(lines) - 1) / 2) * 9
        sheet.text(right, middle + offset, line, BODY, INK if state == "measured" else MUTED, ha="right", va="center_baseline")
