"""Tables of a report: methods against metrics, with spread; and models against methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engines.compare_figures.scale import Scale, scale_of, short_title
from engines.compare_report.html import chip, defined, method_name, text
from engines.compare_view import ABSENT, MethodRow, ModelView, Spread, definition, failure_notes
from engines.figure_style.palette import MethodStyle, method_styles
from engines.metric_groups import GROUPS

CROSS_METRICS = ("decode_tok_s", "ttft_s", "weights_in_use_bytes", "kv_committed_bytes", "baseline_answer_bits_per_byte", "agreement_share")


def metric_groups(view: ModelView) -> dict[str, list[str]]:
    """Metrics that any method has, by group; what this version does not know comes last."""
    grouped = {name: [m for m in metrics if view.measured(m)] for name, metrics in GROUPS.items()}
    known = {m for metrics in GROUPS.values() for m in metrics}
    grouped["Other"] = sorted({m for r in view.rows for m in r.metrics} - known)
    return {name: metrics for name, metrics in grouped.items() if metrics}


def spread_cell(spread: Spread | None, scale: Scale, absent: str) -> str:
    """A median with its 10th to 90th percentile and count; words where there is none."""
    if spread is None:
        return f'<td class="absent">{absent}</td>'
    ends = [] if spread.p10 is None or spread.p90 is None else [scale.text(spread.p10), scale.text(spread.p90)]
    width = f"<small>{text(' to '.join(ends))}</small>" if len(set(ends)) > 1 else ""
    count = "" if spread.count is None else f' title="median of {spread.count} {"answer" if spread.count == 1 else "answers"}"'
    return f"<td{count}>{text(scale.text(spread.median))}{width}</td>"


def column_scale(views: Sequence[ModelView], metric: str) -> Scale:
    """One unit for a column, or for all of a table over models."""
    found = [r.metrics[metric].median for v in views for r in v.rows if metric in r.metrics]
    return scale_of(found, definition(views[0].record, metric)["unit"])


def method_tables(view: ModelView) -> str:
    """One table a group of metrics, a row a method in the record's order."""
    styles = method_styles(view.methods)
    groups = metric_groups(view)
    if not groups:
        return '<p class="note">Nothing has been measured yet.</p>' + failures(view)
    return "".join(_table(view, name, metrics, styles) for name, metrics in groups.items())


def _table(view: ModelView, name: str, metrics: Sequence[str], styles: Mapping[str, MethodStyle]) -> str:
    metas, scales = {m: definition(view.record, m) for m in metrics}, {m: column_scale([view], m) for m in metrics}
    arrow = {"low": ' <span class="better" title="less is better">↓</span>', "high": ' <span class="better" title="more is better">↑</span>'}
    heads = "".join(
        f'<th scope="col">{defined(short_title(m, d["title"]), d["title"] + ": " + d["definition"])}{arrow.get(d["better"] or "", "")}'
        f"<small>{text(scales[m].unit)}</small></th>" for m, d in metas.items()
    )
    rows = "".join(_row(row, scales, styles) for row in view.rows)
    return (
        f'<h4>{text(name)}</h4><div class="scroll" tabindex="0" role="region" aria-label="{text(name)}"><table><thead><tr><th scope="col">Method</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(row: MethodRow, scales: Mapping[str, Scale], styles: Mapping[str, MethodStyle]) -> str:
    head = f'<th scope="row">{method_name(row.method, styles[row.method])} {chip(row.label)}</th>'
    if row.state != "measured":
        return f'<tr>{head}<td class="absent" colspan="{len(scales)}">{ABSENT[row.state]}</td></tr>'
    return f"<tr>{head}{''.join(spread_cell(row.metrics.get(m), scale, 'not measured') for m, scale in scales.items())}</tr>"


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
        meta, scale = definition(views[0].record, metric), column_scale(views, metric)
        rows = "".join(f'<tr><th scope="row">{method_name(m, styles[m])}</th>{"".join(_cross_cell(v, m, metric, scale) for v in views)}</tr>' for m in methods)
        out.append(
            f'<h4>{defined(meta["title"], meta["definition"])}, {text(scale.unit)}</h4><div class="scroll" tabindex="0" role="region" aria-label="{text(meta["title"])}"><table><thead><tr>'
            f'<th scope="col">Method</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        )
    return "".join(out)


def _cross_cell(view: ModelView, method: str, metric: str, scale: Scale) -> str:
    state = next((r.state for r in view.rows if r.method == method), "waiting")
    return spread_cell(view.spread(method, metric), scale, ABSENT[state])
