"""Figures as files, for reports: pure functions from results to matplotlib figures."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from engines.figure_style.palette import NEUTRAL, PALETTE
from engines.figure_style.paper import save_figure
from engines.larosa_sweep import by_variant

__all__ = ["quality_against_bytes", "save_figure"]

_NAMES = {
    "larosa": "LaRoSA (rotation a layer, Top-K)", "larosa_threshold": "LaRoSA's rotation, thresholds", "one_rotation": "one rotation, Top-K",
    "one_rotation_threshold": "one rotation, thresholds",
    "online_rotation": "online rotation", "topk": "unrotated Top-K", "teal": "TEAL thresholds", "cats": "CATS, gate only",
}
_STYLES = ("-o", "-s", "--^", "--<", ":D", "-v", "-P", "-X")


def quality_against_bytes(data: dict[str, Any], title: str) -> Figure:
    """Bits per byte over weight bytes a token, one line a variant, the dense model as a cross-hair.

    Args:
        data: what `engines.larosa_sweep.sweep` returns.
    """
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    dense = data["dense"]
    scale = 2**20
    for place, (variant, rows) in enumerate(by_variant(data["rows"])):
        axes.plot(
            [r["bytes_per_token"] / scale for r in rows], [r["bits_per_byte"] for r in rows], _STYLES[place % len(_STYLES)],
            color=(*PALETTE, "#000000", NEUTRAL)[place % 8], label=_NAMES.get(variant, variant), markersize=4.5, linewidth=1.5,
        )
    axes.axhline(dense["bits_per_byte"], color=NEUTRAL, linewidth=1, zorder=0)
    axes.axvline(dense["bytes_per_token"] / scale, color=NEUTRAL, linewidth=1, zorder=0)
    seen = [r["bits_per_byte"] for r in data["rows"]]
    best, highest = min(*seen, dense["bits_per_byte"]), min(max(seen), 2.2 * min(seen))  # far beyond, nothing can be read of the rest
    axes.set_ylim(best - 0.06 * (highest - best), highest + 0.06 * (highest - best) + 1e-3)
    axes.set_xlabel("weights a token needs, MiB (adapters and head included)")
    axes.set_ylabel("bits per byte, lower is better")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return figure
