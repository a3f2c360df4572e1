"""All figures of a comparison, drawn and written as PNG files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from engines.compare_figures.all_methods import all_methods
from engines.compare_figures.bar_figures import (
    comprehensive_dashboard,
    efficiency_metrics,
    memory_metrics,
    quality_comparison,
    time_metrics,
    token_metrics,
)
from engines.compare_figures.cross_model import cross_model
from engines.compare_figures.pairs import input_output_pairs
from engines.compare_figures.pareto_plot import pareto
from engines.compare_figures.performance import output_lengths, performance_dashboard
from engines.compare_view import ModelView, Record, model_views
from engines.figure_style.paper import RC, save_figure

FIGURES: dict[str, Callable[[ModelView], Figure]] = {
    "time_metrics": time_metrics, "token_metrics": token_metrics, "memory_metrics": memory_metrics, "efficiency_metrics": efficiency_metrics,
    "comprehensive_dashboard": comprehensive_dashboard, "quality_comparison": quality_comparison, "input_output_pairs": input_output_pairs,
    "performance_dashboard": performance_dashboard, "all_methods": all_methods, "output_lengths": output_lengths, "pareto": pareto,
}
CROSS_MODEL = "cross_model"


def draw(name: str, view: ModelView) -> Figure:
    """One figure of one model by its name."""
    with mpl.rc_context(RC):
        return FIGURES[name](view)


def draw_cross_model(views: Sequence[ModelView]) -> Figure:
    """The figure over all models."""
    with mpl.rc_context(RC):
        return cross_model(views)


def model_slugs(model_ids: Sequence[str]) -> list[str]:
    """A part of a file name for each model: no path, no blank, no two alike."""
    out: list[str] = []
    for model_id in model_ids:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", model_id).strip("-.")[:80] or "model"
        slug, count = plain, 2
        while slug.lower() in (s.lower() for s in out):
            slug, count = f"{plain}-{count}", count + 1
        out.append(slug)
    return out


def figure_names(record: Record) -> Iterator[tuple[str, str, ModelView | None]]:
    """File stem, figure, and the model's view (None: over all models), for every figure of a record."""
    views = model_views(record)
    for view, slug in zip(views, model_slugs([v.model_id for v in views]), strict=True):
        for name in FIGURES:
            yield (name if len(views) == 1 else f"{name}-{slug}"), name, view
    if len(views) > 1:
        yield CROSS_MODEL, CROSS_MODEL, None


def write_figures(record: Record, folder: Path) -> list[Path]:
    """Draw every figure of a record into `folder`, which is made if need be; each file is whole or not there.

    With one model `time_metrics.png` and so on; with several `time_metrics-<model>.png`, and `cross_model.png`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for stem, name, view in figure_names(record):
        path = folder / f"{stem}.png"
        save_figure(draw_cross_model(model_views(record)) if view is None else draw(name, view), path)
        out.append(path)
    return out
