"""Figures of a comparison: matplotlib for files (`files`), plotly for the page (`page`)."""
