"""The look of plotly figures: transparent, readable on light and dark, no chart junk."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from engines.figure_style.palette import NEUTRAL

GRID = "rgba(128,135,147,0.25)"


def axis_look() -> dict[str, Any]:
    """Faint grid, no zero line, room for labels."""
    return {"gridcolor": GRID, "zeroline": False, "linecolor": "rgba(128,135,147,0.5)", "automargin": True}


def plain_layout(figure: go.Figure, title: str, x_title: str, y_title: str) -> go.Figure:
    """The look all figures of the page share."""
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"color": NEUTRAL, "size": 13},
        title={"text": title, "font": {"size": 14}, "x": 0, "xref": "paper", "y": 0.98, "yanchor": "top"},
        margin={"l": 56, "r": 16, "t": 64, "b": 44}, height=300, hovermode="x unified", showlegend=True,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        xaxis={**axis_look(), "title": x_title}, yaxis={**axis_look(), "title": y_title, "rangemode": "tozero"},
    )
    return figure
