"""Metrics of two columns as an HTML table: baseline, fused, ratio."""

from __future__ import annotations

from typing import Any

from core.units import NOT_MEASURED, format_ratio
from engines.metric_groups import GROUPS
from engines.metric_text import format_metric
from engines.metrics import METRICS, ChatMetrics
from ui import texts
from ui.safe_text import show_html

_TIMES = frozenset(GROUPS["Time"] + GROUPS["Efficiency"])


_BY_LENGTH = frozenset({"total_s", "kv_in_use_bytes", "kv_committed_bytes", "kv_reserved_bytes"})


def _ratio_cell(name: str, baseline: Any, fused: Any, comparable: bool, same_length: bool) -> str:
    better = METRICS[name]["better"]
    if isinstance(baseline, str) or isinstance(fused, str) or METRICS[name]["unit"] == "share":
        return "<td></td>"
    if name in _TIMES and not comparable:
        return f'<td title="Both engines ran at once and shared the cores.">{NOT_MEASURED}</td>'
    text = format_ratio(fused, baseline)
    if name in _BY_LENGTH and not same_length:
        return f'<td title="The answers differ in length, so this ratio is not a gain or a loss.">{text}</td>'
    if text == NOT_MEASURED or better is None or abs(fused / baseline - 1) < 0.005:
        return f"<td>{text}</td>"
    good = (fused < baseline) == (better == "low")
    return f'<td class="{"better" if good else "worse"}">{text} <span class="mark">{"better" if good else "worse"}</span></td>'


def metrics_table(baseline: ChatMetrics | None, fused: ChatMetrics | None, fused_title: str) -> str:
    """The table; a column whose answer failed or did not run shows dashes."""
    if baseline is None and fused is None:
        return f'<p class="empty-note">{texts.EMPTY_METRICS}</p>'
    comparable = all(m is None or m.times_comparable for m in (baseline, fused))
    same_length = baseline is None or fused is None or baseline.output_tokens == fused.output_tokens
    rows = []
    for group, names in GROUPS.items():
        measured = [name for name in names if any(getattr(side, name, None) is not None for side in (baseline, fused))]
        if measured:
            rows.append(f'<tr class="group"><th colspan="4" scope="colgroup">{group}</th></tr>')
        for name in measured:
            left, right = getattr(baseline, name, None), getattr(fused, name, None)
            title, definition = METRICS[name]["title"], show_html(METRICS[name]["definition"])
            rows.append(
                f'<tr data-metric="{name}"><th scope="row"><span tabindex="0" class="defined" title="{definition}">{title}</span></th>'
                f"<td>{show_html(format_metric(name, left))}</td><td>{show_html(format_metric(name, right))}</td>"
                f"{_ratio_cell(name, left, right, comparable, same_length)}</tr>"
            )
    note = "" if comparable else '<p class="warn-note">Both engines ran at once: their times are not comparable.</p>'
    return (
        f'{note}<table class="metrics"><thead><tr><th scope="col">Measured</th><th scope="col">Baseline</th>'
        f'<th scope="col">{show_html(fused_title)}</th><th scope="col">Ratio</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f'<p class="foot-note">{texts.FOOTNOTE}</p>'
    )
