"""Speed against memory for the page: sized by quality loss, the Pareto front ringed, names beside the points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from engines.compare_figures.label_places import place_labels
from engines.compare_figures.scale import Scale, scale_of
from engines.compare_view import ModelView
from engines.figure_style.page import GRID, plain_layout
from engines.figure_style.palette import NEUTRAL, MethodStyle, method_styles
from engines.methods import BASELINE
from engines.pareto import Point, front, points

# Names are placed for the plot's size on a phone; where it is wider, points only move apart.
_WIDE, _TALL, _LETTER = 270.0, 300.0, 6.2  # pixels
_LONGEST = 24


def pareto(view: ModelView) -> go.Figure:
    """Decode speed against memory of every method that has both and a quality loss."""
    found, missing = points(view)
    best, styles = {p.method for p in front(found)}, method_styles(view.methods)
    memory = scale_of([p.memory_bytes for p in found], "bytes")
    figure = go.Figure()
    for p in sorted(found, key=lambda q: -q.loss_bits_per_byte):
        _draw_point(figure, p, styles[p.method], memory, p.method in best)
    _look(figure, memory, missing)
    if found:
        logarithmic = _set_ranges(figure, found, memory)
        _draw_baseline(figure, found, memory)
        _draw_names(figure, found, memory, best, logarithmic)
    return figure


def _size(loss: float) -> float:
    return 9 + 22 * math.sqrt(min(1.0, max(0.0, loss) / 0.5))


def _draw_point(figure: go.Figure, p: Point, style: MethodStyle, memory: Scale, on_front: bool) -> None:
    size = _size(p.loss_bits_per_byte)
    at: dict[str, Any] = {"x": [p.memory_bytes / memory.divisor], "y": [p.speed_tok_s], "mode": "markers"}
    if on_front:
        figure.add_scatter(**at, marker={"size": size + 8, "symbol": f"{style.symbol}-open", "color": NEUTRAL, "line": {"width": 2}}, hoverinfo="skip")
    agreed = "" if p.agreement is None else f"<br>agreement {p.agreement:.0%}"
    figure.add_scatter(
        **at, name=escape(p.method), marker={"size": size, "symbol": style.symbol, "color": style.colour, "opacity": 1.0 if on_front else 0.6, "line": {"width": 0}},
        customdata=[[f"{p.loss_bits_per_byte:.4f} bits/byte lost{agreed}{'<br>on the Pareto front' if on_front else ''}"]],
        hovertemplate=f"<b>{escape(p.method)}</b><br>%{{y:.4g}} tok/s, %{{x:.4g}} {memory.unit}<br>%{{customdata[0]}}<extra></extra>",
    )


def _look(figure: go.Figure, memory: Scale, missing: dict[str, str]) -> None:
    plain_layout(figure, "Speed, memory and quality", f"weights + KV cache, {memory.unit}", "decode speed, tok/s")
    lines = ["size: bits per byte lost", "ringed and bold: on the Pareto front", *(f"not shown: {escape(m)} ({escape(why[:40])})" for m, why in missing.items())]
    figure.update_layout(
        height=470 + 15 * len(lines), hovermode="closest", showlegend=False, margin={"l": 56, "r": 16, "t": 56 + 15 * len(lines), "b": 48}, dragmode=False,
        title={"xref": "container", "x": 0.0, "pad": {"l": 8}, "yref": "container", "y": 0.98, "subtitle": {"text": "<br>".join(lines), "font": {"size": 11}}},
    )
    figure.update_xaxes(fixedrange=True, tickfont={"size": 11}, title={"font": {"size": 12}})
    figure.update_yaxes(fixedrange=True, tickfont={"size": 11}, title={"font": {"size": 12}})


def _set_ranges(figure: go.Figure, found: Sequence[Point], memory: Scale) -> bool:
    """Memory from zero; speed from zero, or logarithmic where it spans more than five times. Returns whether it is logarithmic."""
    speeds, sizes = [p.speed_tok_s for p in found], [p.memory_bytes / memory.divisor for p in found]
    figure.update_xaxes(range=[0, max(sizes) * 1.2 or 1.0])
    if min(speeds) <= 0 or max(speeds) <= 5 * min(speeds):
        figure.update_yaxes(range=[0, max(speeds) * 1.15 or 1.0])
        return False
    low, high = math.log10(min(speeds)) - 0.2, math.log10(max(speeds)) + 0.2
    ticks = [n * 10.0**p for p in range(math.floor(low), math.ceil(high) + 1) for n in (1, 2, 5)]
    figure.update_yaxes(type="log", range=[low, high], tickvals=ticks, tickformat=",~g", gridcolor=GRID)
    return True


def _draw_baseline(figure: go.Figure, found: Sequence[Point], memory: Scale) -> None:
    base = next((p for p in found if p.method == BASELINE), None)
    if base is not None:
        line = {"color": NEUTRAL, "width": 1.2, "dash": "dash"}
        figure.add_hline(y=base.speed_tok_s, line=line)
        figure.add_vline(x=base.memory_bytes / memory.divisor, line=line)


def _draw_names(figure: go.Figure, found: Sequence[Point], memory: Scale, best: set[str], logarithmic: bool) -> None:
    (left, right), (low, high) = figure.layout.xaxis.range, figure.layout.yaxis.range
    ranked = sorted(found, key=lambda q: (q.method not in best, -q.speed_tok_s))
    heights = {p.method: math.log10(p.speed_tok_s) if logarithmic else p.speed_tok_s for p in ranked}
    dots = {p.method: (_WIDE * (p.memory_bytes / memory.divisor - left) / (right - left), _TALL * (heights[p.method] - low) / (high - low)) for p in ranked}
    radii = {p.method: _size(p.loss_bits_per_byte) / 2 + (4 if p.method in best else 0) for p in ranked}
    names = {p.method: p.method if len(p.method) <= _LONGEST else p.method[: _LONGEST - 1] + "…" for p in ranked}
    places = place_labels(dots, radii, {m: _LETTER * len(n) + 4 for m, n in names.items()}, (0, 0, _WIDE, _TALL))
    for p in ranked:
        dx, dy = places[p.method]
        text = f"<b>{escape(names[p.method])}</b>" if p.method in best else escape(names[p.method])
        figure.add_annotation(
            x=p.memory_bytes / memory.divisor, y=heights[p.method], ax=dx, ay=-dy, text=text, font={"size": 11, "color": NEUTRAL}, xanchor="left", yanchor="middle",
            showarrow=True, arrowhead=0, arrowwidth=0.7, arrowcolor=NEUTRAL if abs(dy) > 16 else "rgba(0,0,0,0)", standoff=radii[p.method],
        )
