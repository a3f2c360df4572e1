"""Speed in detail: medians, the spread of single tokens, and how much the query matters."""

from __future__ import annotations

from matplotlib.figure import Figure

from engines.compare_figures.bars import NOTE, Bars
from engines.compare_figures.grid import Panel, panel_grid
from engines.compare_figures.strips import Gaps, Points
from engines.compare_view import ModelView, number


def performance_dashboard(view: ModelView) -> Figure:
    """Decode speed and first token as bars, all gaps between tokens, decode speed by query."""
    panels: list[list[Panel]] = [[Bars("decode_tok_s"), Bars("ttft_s")], [Gaps()], [Points("decode_tok_s", per_query=True)]]
    return panel_grid(view, "Performance", panels, view.sorted_methods("decode_tok_s"), [NOTE])


def output_lengths(view: ModelView) -> Figure:
    """How long the answers are, every answer a point, with the longest allowed."""
    limit = number((view.record.get("settings") or {}).get("max_new_tokens"))
    notes = ["Tick: median." + ("" if limit is None else f" Dotted line: the most tokens an answer may have here, {limit:g}.")]
    cut = {m: sum((c.get("metrics") or {}).get("finish_reason") == "length" for c in view.cells_of(m)) for m in view.methods}
    if any(cut.values()):
        notes.append("Cut off there: " + ", ".join(f"{m} {n} of {len(view.cells_of(m))}" for m, n in cut.items() if n) + ".")
    return panel_grid(view, "Length of the answers", [[Points("output_tokens", limit)]], view.sorted_methods("output_tokens"), notes)
