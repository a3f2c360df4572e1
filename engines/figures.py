"""Figures from results: pure functions, plotly for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import plotly.graph_objects as go

from engines.figure_style.page import plain_layout
from engines.figure_style.palette import PALETTE


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
