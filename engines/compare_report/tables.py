"""Tables of a report: methods against metrics, with spread; and models against methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engines.compare_figures.scale import short_title
from engines.compare_report.html import chip, defined, method_name, text
from engines.compare_view import MethodRow, ModelView, Spread, definition, failure_notes
from engines.figure_style.palette import MethodStyle, method_styles
from engines.metric_groups import GROUPS
from engines.metric_text import format_value

ABSENT = {"measured": "not measured", "failed": "failed", "waiting": "waiting"}
CROSS_METRICS = ("decode_tok_s", "ttft_s", "weights_in_use_bytes", "kv_committed_bytes", "baseline_answer_bits_per_byte", "agreement_share")


def metric_groups(view: ModelView) -> dict[str, list[str]]:
    """Metrics that any method has, by group; what this version does not know comes last."""
    grouped = {name: [m for m in metrics if view.measured(m)] for name, metrics in GROUPS.items()}
    known = {m for metrics in GROUPS.values() for m in metrics}
    grouped["Other"] = sorted({m for r in view.rows for m in r.metrics} - known)
    return {name: metrics for name, metrics in grouped.items() if metrics}


def spread_cell(spread: Spread | None, unit: str, absent: str) -> str:
    """A median with its 10th to 90th percentile and count; words where there is none."""
    if spread is None:
        return f'<td class="absent">{absent}</td>'
    width = ""
    if spread.p10 is not None and spread.p90 is not None and spread.count != 1:
        width = f"<small>{text(format_value(spread.p10, unit))} to {text(format_value(spread.p90, unit))}</small>"
    count = "" if spread.count is None else f' title="median of {spread.count} {"answer" if spread.count == 1 else "answers"}"'
    return f"<td{count}>{text(format_value(spread.median, unit))}{width}</td>"


def method_tables(view: ModelView) -> str:
    """One table a group of metrics, a row a method in the record's order."""
    styles = method_styles(view.methods)
    groups = metric_groups(view)
    if not groups:
        return '<p class="note">Nothing has been measured yet.</p>' + failures(view)
    return "".join(_table(view, name, metrics, styles) for name, metrics in groups.items())


def _table(view: ModelView, name: str, metrics: Sequence[str], styles: Mapping[str, MethodStyle]) -> str:
    metas = {m: definition(view.record, m) for m in metrics}
    arrow = {"low": ' <span class="better" title="less is better">↓</span>', "high": ' <span class="better" title="more is better">↑</span>'}
    heads = "".join(
        f'<th scope="col">{defined(short_title(m, d["title"]), d["title"] + ": " + d["definition"])}{arrow.get(d["better"] or "", "")}</th>' for m, d in metas.items()
    )
    rows = "".join(_row(row, metrics, metas, styles) for row in view.rows)
    return (
        f'<h4>{text(name)}</h4><div class="scroll" tabindex="0" role="region" aria-label="{text(name)}"><table><thead><tr><th scope="col">Method</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(row: MethodRow, metrics: Sequence[str], metas: Mapping[str, Mapping[str, str]], styles: Mapping[str, MethodStyle]) -> str:
    head = f'<th scope="row">{method_name(row.method, styles[row.method])} {chip(row.label)}</th>'
    if row.state != "measured":
        return f'<tr>{head}<td class="absent" colspan="{len(metrics)}">{ABSENT[row.state]}</td></tr>'
    return f"<tr>{head}{''.join(spread_cell(row.metrics.get(m), metas[m]['unit'], 'not measured') for m in metrics)}</tr>"


def definitions_list(view: ModelView) -> str:
    """Every shown metric's definition: a phone has no tooltips."""
    items = []
    for metrics in metric_groups(view).values():
        for metric in metrics:
            meta = definition(view.record, metric)
            items.append(f"<div><dt>{text(meta['title'])}</dt><dd>{text(meta['definition'])}</dd></div>")
    return f'<details><summary>What each column means</summary><dl class="facts wide">{"".join(items)}</dl></details>' if items else ""


def failures(view: ModelView) -> str:
    """What failed and why; empty when nothing did."""
    notes = failure_notes(view)
    return f'<ul class="failures">{"".join(f"<li>{text(n)}</li>" for n in notes)}</ul>' if notes else ""


def cross_table(views: Sequence[ModelView]) -> str:
    """Methods against models, a table a metric."""
    methods = list(dict.fromkeys(m for v in views for m in v.methods))
    styles = method_styles(methods)
    heads = "".join(f'<th scope="col">{text(v.model_id)}</th>' for v in views)
    out = []
    for metric in CROSS_METRICS:
        if not any(v.measured(metric) for v in views):
            continue
        meta = definition(views[0].record, metric)
        rows = "".join(f'<tr><th scope="row">{method_name(m, styles[m])}</th>{"".join(_cross_cell(v, m, metric, meta["unit"]) for v in views)}</tr>' for m in methods)
        out.append(
            f'<h4>{defined(meta["title"], meta["definition"])}</h4><div class="scroll" tabindex="0" role="region" aria-label="{text(meta["title"])}"><table><thead><tr>'
            f'<th scope="col">Method</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        )
    return "".join(out)


def _cross_cell(view: ModelView, method: str, metric: str, unit: str) -> str:
    state = next((r.state for r in view.rows if r.method == method), "waiting")
    return spread_cell(view.spread(method, metric), unit, ABSENT[state])
