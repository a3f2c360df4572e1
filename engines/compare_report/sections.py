"""Sections of a report: settings, labels, methods, the Pareto front, one model."""

from __future__ import annotations

from typing import Any

from engines.compare_figures.files import FIGURES, draw
from engines.compare_report.answers import answers_section
from engines.compare_report.html import chip, facts, method_name, text
from engines.compare_report.svg import inline_svg
from engines.compare_report.tables import definitions_list, failures, method_tables
from engines.compare_view import ModelView, Record
from engines.figure_style.palette import method_styles
from engines.label_text import LABELS, MIXED, REFERENCE
from engines.pareto import front, points, recommend

# The answers stand on the page as text, so their figure is left out.
SHOWN = ("all_methods", "pareto", "comprehensive_dashboard", "performance_dashboard", "time_metrics", "token_metrics", "memory_metrics", "efficiency_metrics", "quality_comparison", "output_lengths")
assert set(SHOWN) | {"input_output_pairs"} == set(FIGURES)


def settings_section(record: Record) -> str:
    """What was asked for and on which machine, all of it."""
    settings, provenance = record.get("settings") or {}, record.get("provenance") or {}
    return (
        f'<section id="settings"><h2>Settings and provenance</h2><div class="two"><div><h3>Asked for</h3>{facts(settings.items())}</div>'
        f"<div><h3>Machine and versions</h3>{facts(provenance.items())}</div></div></section>"
    )


def labels_section(record: Record) -> str:
    """What the labels claim, and what each method is made of."""
    items = "".join(f"<div><dt>{chip(name)}</dt><dd>{text(words)}</dd></div>" for name, words in {"reference": REFERENCE, **LABELS, "mixed": MIXED}.items())
    return f'<section id="labels"><h2>What the labels claim</h2><dl class="facts wide">{items}</dl>{_compositions(record)}</section>'


def _compositions(record: Record) -> str:
    rows = []
    for method in record.get("methods") or ():
        left_out = "; ".join(f"{name}: {why}" for name, why in (method.get("excluded") or {}).items())
        if method.get("spelled") != method.get("method") or left_out:
            members = text(method.get("spelled") or "")
            rows.append(f"<li><b>{text(method.get('method'))}</b> is <code>{members}</code>{f'; left out: {text(left_out)}' if left_out else ''}</li>")
    return f"<h3>Methods made of several</h3><ul>{''.join(rows)}</ul>" if rows else ""


def model_section(view: ModelView, anchor: str) -> str:
    """Everything measured of one model."""
    choice = view.model.get("dtype_choice") or {}
    about = facts([("model", view.model_id), *((k, view.model.get(k)) for k in ("revision", "dtype", "source")), *([("why this dtype", choice.get("reason"))] if choice else [])])
    failed = failures(view)
    return (
        f'<section id="{anchor}"><h2>{text(view.model_id)}</h2>{about}{f"<h3>What failed</h3>{failed}" if failed else ""}'
        f'<h3>Measured</h3><p class="note">Median over answers, below it the 10th to 90th percentile. ↓ less is better, ↑ more is better.</p>{method_tables(view)}{definitions_list(view)}'
        f"{choice_part(view)}<h3>Figures</h3>{figures_part(view, anchor)}<h3>What was changed in the model</h3>{changes_part(view)}"
        f"<h3>Answers</h3>{answers_section(view)}</section>"
    )


def figures_part(view: ModelView, prefix: str) -> str:
    """All figures as inline SVG."""
    drawn = (inline_svg(draw(name, view), f"{prefix}-{name}", f"{name.replace('_', ' ')} of {view.model_id}") for name in SHOWN)
    return f'<div class="figures">{"".join(f"<figure>{svg}</figure>" for svg in drawn)}</div>'


def choice_part(view: ModelView) -> str:
    """The Pareto front, and which method to take without limits."""
    advice, (found, missing) = recommend(view.record, model_id=view.model_id), points(view)
    if not found:
        return f'<h3>Which to take</h3><p class="note">{text(" ".join(advice.reasons))}</p>'
    styles, best = method_styles(view.methods), front(found)
    chosen = f"<p><b>Without limits: {method_name(advice.method, styles[advice.method])}</b></p>" if advice.method else ""
    reasons = "".join(f"<li>{text(r)}</li>" for r in advice.reasons)
    names = ", ".join(method_name(p.method, styles[p.method]) for p in best)
    others = "".join(f"<li>{method_name(m, styles[m])}: {text(why)}</li>" for m, why in advice.alternatives.items())
    out = "".join(f"<li>{method_name(m, styles[m])}: {text(why)}</li>" for m, why in {**missing, **advice.excluded}.items())
    return (
        f"<h3>Which to take</h3><p>On the Pareto front of speed, memory and quality: {names}.</p>{chosen}<ul>{reasons}</ul>"
        f'{f"<p>Also on the front:</p><ul>{others}</ul>" if others else ""}'
        f"{f'<details><summary>The others, and why not</summary><ul>{out}</ul></details>' if out else ''}"
    )


def changes_part(view: ModelView) -> str:
    """Each technique's own report: what it touched and what it left alone, from a method's first answer."""
    styles, rows = method_styles(view.methods), []
    for method in view.methods:
        reports = next((c.get("reports") for c in view.cells_of(method) if c.get("reports")), None)
        rows += [f"<li>{method_name(method, styles[method])}: {_change(r)}</li>" for r in reports or ()]
    return f'<ul class="changes">{"".join(rows)}</ul>' if rows else '<p class="note">No technique reported a change.</p>'


def _change(report: dict[str, Any]) -> str:
    skipped = report.get("skipped") or {}
    parts = [
        f"touched {len(report.get('touched') or ())} modules", f"left alone {len(skipped)} ({'; '.join(dict.fromkeys(map(str, skipped.values())))})" if skipped else "",
        *map(str, report.get("notes") or ()),
    ]
    return f"<code>{text(report.get('technique'))}</code> {chip(report.get('label'))} {text('; '.join(p for p in parts if p))}"
