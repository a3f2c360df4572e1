"""Figures of a comparison: matplotlib for files, plotly for the page."""

from __future__ import annotations

from engines.compare_figures.files import write_figures
from engines.compare_figures.page import PAGE_FIGURES, page_figures

__all__ = ["PAGE_FIGURES", "page_figures", "write_figures"]
