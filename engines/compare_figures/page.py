"""Figures of a comparison for the page: plotly, readable on light and dark, complete or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from engines.compare_figures.page_pareto import pareto
from engines.compare_figures.scale import Scale, axis_limit, scale_of, short_title, unit_line
from engines.compare_view import ABSENT, ModelView, Record, Spread, definition, model_view, number
from engines.figure_style.page import axis_look, plain_layout
from engines.figure_style.palette import NEUTRAL, MethodStyle, method_styles
from engines.methods import BASELINE

BAR_FIGURES: dict[str, tuple[str, tuple[tuple[str, ...], ...], str]] = {  # title, panels row by row, what methods are sorted by
    "speed": ("Speed", (("decode_tok_s", "prefill_tok_s"),), "decode_tok_s"),
    "time": ("Time", (("ttft_s", "tpot_median_s"),), "tpot_median_s"),
    "memory": ("Memory", (("weights_in_use_bytes", "kv_committed_bytes"),), "weights_in_use_bytes"),
    "quality": ("Quality", (("baseline_answer_bits_per_byte", "agreement_share"), ("keyword_recall", "rouge_l")), "baseline_answer_bits_per_byte"),
}
PAGE_FIGURES = (*BAR_FIGURES, "output_lengths", "pareto")
_ROW, _HEAD, _LONGEST_NAME, _FULL = 26, 76, 22, 1.65


def page_figures(record: Record, model_id: str | None = None) -> dict[str, go.Figure]:
    """The figures named in PAGE_FIGURES, of one model (the first when none is named); empty without models.

    Works while the record fills: methods without answers say that they wait.
    """
    view = model_view(record, model_id)
    if view is None:
        return {}
    bars = {name: _bar_figure(view, *spec) for name, spec in BAR_FIGURES.items()}
    return {**bars, "output_lengths": output_lengths(view), "pareto": pareto(view)}


def axis_names(methods: Sequence[str]) -> dict[str, str]:
    """Method names for an axis: long ones broken after a plus, escaped, each still its own."""
    return {m: _broken(m, place) for place, m in enumerate(methods, 1)}


def _broken(name: str, place: int) -> str:
    lines: list[str] = []
    rest = name
    while len(rest) > _LONGEST_NAME and len(lines) < 2:
        cut = max((n + 1 for n, c in enumerate(rest[:_LONGEST_NAME]) if c in "+:,"), default=_LONGEST_NAME)
        lines.append(rest[:cut])
        rest = rest[cut:]
    lines.append(rest if len(rest) <= _LONGEST_NAME else f"{rest[: _LONGEST_NAME - 6]}… [{place}]")
    return "<br>".join(escape(line) for line in lines)


def _bar_figure(view: ModelView, title: str, panels: tuple[tuple[str, ...], ...], sort_by: str) -> go.Figure:
    methods = view.sorted_methods(sort_by)
    names, styles = axis_names(methods), method_styles(view.methods)
    columns = max(len(p) for p in panels)
    heads = [_panel_title(view, m) for row in panels for m in row]
    gap = 0.0 if len(panels) == 1 else 90 / _height(methods, len(panels))
    figure = make_subplots(rows=len(panels), cols=columns, shared_yaxes=True, horizontal_spacing=0.06, vertical_spacing=gap, subplot_titles=heads)
    for r, row in enumerate(panels, 1):
        for c, metric in enumerate(row, 1):
            _draw_bars(figure, view, metric, methods, names, styles, r, c)
    _look(figure, title, methods, names, _height(methods, len(panels)))
    figure.update_annotations(selector={"yanchor": "bottom"}, font={"size": 11}, align="left", xanchor="left")
    for place, head in enumerate(a for a in figure.layout.annotations if a.yanchor == "bottom"):
        head.x = figure.layout["xaxis" + ("" if place == 0 else str(place + 1))].domain[0]
    return figure


def _height(methods: Sequence[str], rows: int) -> int:
    return _HEAD + rows * (60 + _ROW * max(2, len(methods))) + (rows - 1) * 30


def _panel_title(view: ModelView, metric: str) -> str:
    meta = definition(view.record, metric)
    return f"<b>{escape(short_title(metric, meta['title']))}</b><br>{escape(unit_line(_scale(view, metric).unit, meta['better']))}"


def _scale(view: ModelView, metric: str) -> Scale:
    return scale_of([r.metrics[metric].median for r in view.rows if metric in r.metrics], definition(view.record, metric)["unit"])


def _draw_bars(figure: go.Figure, view: ModelView, metric: str, methods: Sequence[str], names: dict[str, str], styles: dict[str, MethodStyle], r: int, c: int) -> None:
    scale = _scale(view, metric)
    shown = [(m, s) for m in methods if (s := view.spread(m, metric)) is not None]
    limit = axis_limit([s for _, s in shown]) / scale.divisor
    figure.add_bar(
        x=[s.median / scale.divisor for _, s in shown], y=[names[m] for m, _ in shown], orientation="h", showlegend=False, width=0.62,
        marker={
            "color": [styles[m].colour for m, _ in shown],
            "pattern": {"shape": [styles[m].pattern for m, _ in shown], "fgcolor": "rgba(255,255,255,0.85)", "size": 6, "solidity": 0.3},
        },
        error_x=_error_bars([s for _, s in shown], scale, limit), customdata=[[escape(m), _hover(s, scale)] for m, s in shown],
        hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]}<extra></extra>", row=r, col=c,
    )
    base = view.spread(BASELINE, metric)
    if base is not None:
        figure.add_vline(x=base.median / scale.divisor, line={"color": NEUTRAL, "width": 1.2, "dash": "dash"}, row=r, col=c)
    ticks = [t for t in _round_values(limit) if t <= limit]
    figure.update_xaxes(range=[0, _FULL * limit], showticklabels=bool(shown), tickvals=ticks, tickangle=0, tickformat=".2~s" if limit >= 1000 else ",~g", row=r, col=c)
    figure.add_scatter(  # numbers in a column at the right edge, clear of the error bars
        x=[_FULL * limit] * len(shown), y=[names[m] for m, _ in shown], mode="text", text=[scale.text(s.median) for _, s in shown], textposition="middle left",
        textfont={"size": 11, "color": NEUTRAL}, hoverinfo="skip", showlegend=False, row=r, col=c,
    )
    _draw_absent(figure, view, [m for m in methods if m not in dict(shown)], names, r, c)


def _round_values(limit: float) -> list[float]:
    """Zero and the one or two round numbers up to `limit` that a narrow panel has room for."""
    power = 10.0 ** math.floor(math.log10(limit))
    step = next(s * power for s in (0.5, 1.0, 2.0, 5.0) if limit / (s * power) < 3)
    return [n * step for n in range(5)]


def _hover(spread: Spread, scale: Scale) -> str:
    width = f" ({scale.text(spread.p10)} to {scale.text(spread.p90)})" if spread.p10 is not None and spread.p90 is not None else ""
    count = f"<br>{spread.count} {'answer' if spread.count == 1 else 'answers'}" if spread.count else ""
    return f"{scale.text(spread.median)} {scale.unit}{width}{count}"


def _error_bars(spreads: Sequence[Spread], scale: Scale, limit: float) -> dict[str, Any]:
    known = [s for s in spreads if s.p10 is not None and s.p90 is not None and s.count != 1]
    up = [max(0.0, min(limit, (s.p90 if s in known and s.p90 is not None else s.median) / scale.divisor) - s.median / scale.divisor) for s in spreads]
    down = [max(0.0, s.median - (s.p10 if s in known and s.p10 is not None else s.median)) / scale.divisor for s in spreads]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": "#5b6573", "thickness": 1.4, "width": 0, "visible": bool(known)}


def _draw_absent(figure: go.Figure, view: ModelView, methods: Sequence[str], names: dict[str, str], r: int, c: int) -> None:
    rows = {row.method: row for row in view.rows}
    for method in methods:
        row = rows[method]
        reason = escape(row.error) if row.state == "failed" and row.error else None
        figure.add_annotation(
            x=0, y=names[method], text=f"<i>{ABSENT[row.state]}</i>", hovertext=reason, showarrow=False, xanchor="left", yanchor="middle", font={"size": 12, "color": NEUTRAL}, row=r, col=c,
        )


def _look(figure: go.Figure, title: str, methods: Sequence[str], names: dict[str, str], height: int) -> None:
    plain_layout(figure, title, "", "")
    figure.update_layout(height=height, hovermode="closest", showlegend=False, margin={"l": 8, "r": 20, "t": 82, "b": 36}, bargap=0.3, dragmode=False, title={"xref": "container", "x": 0.0, "pad": {"l": 8}})
    figure.update_xaxes(**axis_look(), rangemode="tozero", fixedrange=True, tickfont={"size": 11})
    figure.update_yaxes(categoryorder="array", categoryarray=[names[m] for m in reversed(methods)], gridcolor="rgba(0,0,0,0)", automargin=True, fixedrange=True, rangemode="normal", tickfont={"size": 11}, range=[-0.6, len(methods) - 0.4])


def output_lengths(view: ModelView) -> go.Figure:
    """Every answer's length a point, the median a box's line."""
    methods = view.sorted_methods("output_tokens")
    names, styles = axis_names(methods), method_styles(view.methods)
    figure = go.Figure()
    for method in methods:
        lengths = view.values(method, "output_tokens")
        style = styles[method]
        if lengths:
            figure.add_box(
                x=lengths, y=[names[method]] * len(lengths), orientation="h", name=escape(method), boxpoints="all", jitter=0.6, pointpos=0, line={"color": style.colour, "width": 1.4},
                fillcolor="rgba(0,0,0,0)", marker={"color": style.colour, "symbol": style.symbol, "size": 6, "opacity": 0.7}, width=0.7, hovertemplate="%{x} tokens",
            )
    _look(figure, "Length of the answers", methods, names, _HEAD + 50 + _ROW * max(3, len(methods)))
    figure.update_layout(margin={"l": 8, "r": 20, "t": 48, "b": 48})
    figure.update_xaxes(title={"text": "tokens of the answer", "font": {"size": 12}})
    limit = number((view.record.get("settings") or {}).get("max_new_tokens"))
    if limit is not None:
        figure.add_vline(x=limit, line={"color": NEUTRAL, "width": 1.2, "dash": "dot"}, annotation={"text": f"most allowed: {limit:g}", "font": {"size": 11}, "xanchor": "right", "yanchor": "bottom", "yref": "paper", "y": 1})
    for method in methods:
        if not view.values(method, "output_tokens"):
            _draw_absent_plain(figure, view, method, names)
    return figure


def _draw_absent_plain(figure: go.Figure, view: ModelView, method: str, names: dict[str, str]) -> None:
    state = next(r.state for r in view.rows if r.method == method)
    if not figure.data:  # a category axis needs a trace
        figure.add_scatter(x=[None], y=[names[method]], mode="markers")
    figure.add_annotation(x=0, y=names[method], text=f"<i>{ABSENT[state]}</i>", showarrow=False, xanchor="left", font={"size": 12, "color": NEUTRAL})
