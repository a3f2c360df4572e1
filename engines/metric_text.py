"""Results as plain text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.units import NOT_MEASURED, format_bytes, format_number, format_percent, format_seconds
from engines.metrics import METRICS, ChatMetrics


def format_metric(name: str, value: Any) -> str:
    """A metric's value as text with its unit."""
    return format_value(value, METRICS[name]["unit"])


def format_value(value: Any, unit: str) -> str:
    """A value of `unit` as text."""
    if value is None:
        return NOT_MEASURED
    if unit == "bytes":
        return format_bytes(value)
    if unit == "s":
        return format_seconds(value)
    if unit == "share":
        return format_percent(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{format_number(value)} {unit}" if "/" in unit else format_number(value)


def metrics_text(columns: Mapping[str, ChatMetrics]) -> str:
    """A table of all metrics, one column a method."""
    if not columns:
        return ""
    rows = [["measured", *columns]]
    for name, meta in METRICS.items():
        values = [getattr(m, name) for m in columns.values()]
        if any(v is not None for v in values):
            rows.append([meta["title"], *(format_metric(name, v) for v in values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows)
