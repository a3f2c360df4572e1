"""Backends: load, run, measure, compare. They return results; they know nothing of pages."""
