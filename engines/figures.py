"""Figures from results: pure functions, plotly for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import plotly.graph_objects as go

# Okabe-Ito: told apart by people with any colour vision. The baseline is always the first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK = "#808793"


def plain_layout(figure: go.Figure, title: str, x_title: str, y_title: str) -> go.Figure:
    """The look all figures share: transparent, readable on light and dark, no chart junk."""
    axis: dict[str, Any] = {"gridcolor": "rgba(128,135,147,0.25)", "zeroline": False, "linecolor": "rgba(128,135,147,0.5)", "automargin": True}
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"color": _INK, "size": 13},
        title={"text": title, "font": {"size": 14}, "x": 0, "xref": "paper", "y": 0.98, "yanchor": "top"},
        margin={"l": 56, "r": 16, "t": 64, "b": 44}, height=300, hovermode="x unified", showlegend=True,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        xaxis={**axis, "title": x_title}, yaxis={**axis, "title": y_title, "rangemode": "tozero"},
    )
    return figure


def token_latency_figure(gaps_s: Mapping[str, Sequence[float]]) -> go.Figure:
    """Time between tokens over the answer, one line a column.

    Args:
        gaps_s: column's title -> seconds between neighbouring tokens.
    """
    figure = go.Figure()
    for colour, (title, gaps) in zip(cycle(PALETTE), gaps_s.items(), strict=False):
        figure.add_scatter(
            x=list(range(2, len(gaps) + 2)), y=[round(g * 1e3, 3) for g in gaps], name=title, mode="lines",
            line={"color": colour, "width": 2}, hovertemplate="%{y:.2f} ms",
        )
    return plain_layout(figure, "Time of each token", "token of the answer", "ms since the token before")
