"""What the Compare tab shows, as HTML: progress, the table that fills, the queries of a file, the recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from core.units import NOT_MEASURED, format_percent, format_ratio, format_time_left
from engines.compare.jobs import Job
from engines.compare.queries import Query
from engines.compare_report.html import chip, defined, method_name
from engines.compare_view import ModelView, definition
from engines.figure_style.palette import method_styles
from engines.methods import BASELINE
from engines.metric_text import format_value
from engines.pareto import Limits, recommend
from ui import texts
from ui.safe_text import show_html

WIDEST = 12
"""Queries that have a column of their own."""
TABLE_METRICS = (
    "decode_tok_s", "ttft_s", "total_s", "prefill_tok_s", "output_tokens", "weights_in_use_bytes", "kv_committed_bytes",
    "baseline_answer_bits_per_byte", "agreement_share", "rouge_l", "keyword_recall", "repetition_rate",
)


def status_line(job: Job | None, refused: str | None = None) -> str:
    """How far the work is, or why there is none."""
    if refused is not None or (job is not None and job.failed):
        return f'<div class="compare-status" data-state="failed" role="alert">{show_html(refused or (job.failed if job else ""))}</div>'
    if job is None:
        return f'<div class="compare-status" data-state="idle">{texts.COMPARE_IDLE}</div>'
    progress = job.live.progress
    left = "" if progress.seconds_left is None or not job.running else f", {format_time_left(progress.seconds_left)} left"
    state = "working" if job.running else "done" if job.complete else "stopped"
    words = {"working": f"{progress.text}{left}", "done": _done_words(job), "stopped": texts.COMPARE_STOPPED}[state]
    percent = format_percent(progress.fraction)
    return (
        f'<div class="compare-status" data-state="{state}"><progress max="1" value="{progress.fraction:.4f}" aria-label="progress">{percent}</progress>'
        f'<span aria-live="polite"><b>{percent}</b> {show_html(words)}</span></div>'
    )


def _done_words(job: Job) -> str:
    cells = job.live.record["cells"]
    failed = sum(c["status"] == "failed" for c in cells)
    return f"finished: {len(cells)} answers" + (f", {failed} of them failed; the reasons are below" if failed else "")


def cell_table(view: ModelView | None, metric: str, running: tuple[str, str, str, int] | None = None) -> str:
    """Methods down, queries across, one metric; medians over repeats in a cell, over all answers in the second column."""
    if view is None:
        return f'<p class="empty-note">{texts.COMPARE_EMPTY}</p>'
    meta = definition(view.record, metric)
    queries = list(view.queries)[:WIDEST]
    styles = method_styles(view.methods)
    base = view.spread(BASELINE, metric)
    heads = "".join(f'<th scope="col" title="{show_html(q["question"][:500])}">{show_html(str(q["id"])[:24])}</th>' for q in queries)
    busy = running if running is not None and running[0] == view.model_id else None
    rows = []
    for row in view.rows:
        spread = row.metrics.get(metric)
        whole = format_value(spread.median, meta["unit"]) if spread else ""
        ratio = format_ratio(spread.median, base.median) if spread and base and row.method != BASELINE else ""
        cells = "".join(_cell(view, row.method, str(q["id"]), metric, meta["unit"], busy) for q in queries)
        rows.append(
            f'<tr data-method="{show_html(row.method)}"><th scope="row">{method_name(row.method, styles[row.method])} {chip(row.label)}</th>'
            f'<td class="whole">{show_html(whole or NOT_MEASURED)}</td><td>{"" if ratio == NOT_MEASURED else show_html(ratio)}</td>{cells}</tr>'
        )
    more = f'<p class="foot-note">{len(view.queries) - WIDEST} more queries are in the median and in the files.</p>' if len(view.queries) > WIDEST else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="figures by method and query"><table class="cells"><caption>{defined(meta["title"], meta["definition"])}</caption>'
        f'<thead><tr><th scope="col">Method</th><th scope="col">Median</th><th scope="col">to baseline</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{more}'
    )


def _cell(view: ModelView, method: str, query: str, metric: str, unit: str, busy: tuple[str, str, str, int] | None) -> str:
    cells = [c for c in view.cells if c["method"] == method and c["query"] == query]
    if busy is not None and busy[1:3] == (method, query):
        return '<td class="running" aria-label="running">…</td>'
    values = [v for v in ((c["metrics"] or {}).get(metric) for c in cells if c["status"] == "done") if isinstance(v, (int, float))]
    failed = [c for c in cells if c["status"] == "failed"]
    if values:
        ranked = sorted(values)
        middle = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
        count = f' title="median of {len(values)} of {len(cells)} repeats"' if len(cells) > 1 else ""
        return f"<td{count}>{show_html(format_value(middle, unit))}</td>"
    if failed:
        return f'<td class="failed" title="{show_html(str(failed[0]["error"])[:500])}">failed</td>'
    done = any(c["status"] == "done" for c in cells)
    cancelled = any(c["status"] == "cancelled" for c in cells)
    return f'<td class="absent">{NOT_MEASURED if done else "cancelled" if cancelled else ""}</td>'


def query_preview(queries: Sequence[Query], error: str | None = None) -> str:
    """The first queries of a file as they will be asked, or what is wrong with the file."""
    if error is not None:
        return f'<p class="warn-note" role="alert">{show_html(error)}</p>'
    if not queries:
        return f'<p class="foot-note">{texts.QUERY_FILE_HELP}</p>'
    rows = "".join(
        f'<tr><td>{show_html(q.id)}</td><td class="question">{show_html(q.question[:300])}{"…" if len(q.question) > 300 else ""}</td><td>{show_html("; ".join(q.keywords[:8]))}</td></tr>'
        for q in queries[:8]
    )
    more = f'<p class="foot-note">and {len(queries) - 8:,} more</p>' if len(queries) > 8 else ""
    return (
        f'<p class="foot-note">{len(queries):,} {"query" if len(queries) == 1 else "queries"} read.</p><div class="scroll"><table class="preview"><thead><tr><th>id</th><th>question</th>'
        f"<th>keywords</th></tr></thead><tbody>{rows}</tbody></table></div>{more}"
    )


def recommendation(record: Mapping[str, Any], limits: Limits, model_id: str | None) -> str:
    """The method to take under the user's limits, why, and why not the others."""
    if not record:
        return f'<p class="empty-note">{texts.COMPARE_NO_ADVICE}</p>'
    advice = recommend(record, limits, model_id)
    reasons = "".join(f"<li>{show_html(r)}</li>" for r in advice.reasons)
    head = f"<strong>{show_html(advice.method)}</strong>" if advice.method else "<strong>No method</strong>"
    lists = "".join(
        f"<details><summary>{title} ({len(rows)})</summary><ul>{''.join(f'<li><b>{show_html(m)}</b>: {show_html(why)}</li>' for m, why in rows.items())}</ul></details>"
        for title, rows in (("Also on the Pareto front", advice.alternatives), ("Not chosen", advice.excluded)) if rows
    )
    return f'<div class="advice"><p class="advice-head"><span>Take</span> {head}</p><ul>{reasons}</ul>{lists}</div>'
