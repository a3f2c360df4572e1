"""The one look of all figures: colours of methods, plotly for the page, matplotlib for files."""
