"""What techniques really changed, as HTML."""

from __future__ import annotations

from collections.abc import Sequence

from core.technique import Report
from core.units import format_bytes
from engines.label_text import LABELS
from ui.safe_text import show_html


def _row(report: Report) -> str:
    label = report.label.value
    size = ""
    if report.bytes_before:
        size = f"{format_bytes(report.bytes_before)} became {format_bytes(report.bytes_after)}"
    where = f"{len(report.touched)} modules" if len(report.touched) > 1 else (report.touched[0] if report.touched else "nothing")
    skipped = "; ".join(f"{path}: {reason}" for path, reason in list(report.skipped.items())[:3])
    more = f" and {len(report.skipped) - 3} more" if len(report.skipped) > 3 else ""
    details = [f"touched {where}", size, *report.notes, f"left alone: {skipped}{more}" if skipped else ""]
    return (
        f'<li><code>{show_html(report.technique)}</code> <span class="chip chip-{label}" title="{LABELS[label]}">{label}</span> '
        f"{show_html('; '.join(d for d in details if d))}</li>"
    )


def report_view(reports: Sequence[Report], dtype_reason: str | None) -> str:
    """A list: the baseline's number format and why, then each technique with its label and what it touched."""
    rows = [_row(r) for r in reports]
    if dtype_reason:
        rows.insert(0, f"<li><code>baseline</code> {show_html(dtype_reason)}</li>")
    return f'<ul class="report">{"".join(rows)}</ul>' if rows else ""
