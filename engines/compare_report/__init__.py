"""A comparison as one HTML file that fetches nothing: `write_report(record, path)`."""

from __future__ import annotations

from pathlib import Path

from core.files import write_text
from engines.compare_figures.files import draw_cross_model
from engines.compare_report.html import text
from engines.compare_report.sections import labels_section, model_section, settings_section
from engines.compare_report.svg import inline_svg
from engines.compare_report.tables import cross_table
from engines.compare_view import ModelView, Record, model_views

_ASSETS = Path(__file__).resolve().parents[2] / "assets"
_CSS = (_ASSETS / "report.css", _ASSETS / "comparison.css")
# Nothing may be fetched or run, whatever an answer holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def report_html(record: Record) -> str:
    """The whole page as text."""
    views = model_views(record)
    anchors = [f"model-{n}" for n in range(1, len(views) + 1)]
    body = [_header(record, views, anchors)]
    if len(views) > 1:
        body.append(_across(views))
    body += [model_section(v, a) for v, a in zip(views, anchors, strict=True)]
    body += [labels_section(record), settings_section(record)]
    css = "".join(path.read_text(encoding="utf-8") for path in _CSS)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><meta name="color-scheme" content="light dark"><title>Comparison of methods</title>'
        f"<style>{css}</style></head><body><main class='comparison'>{''.join(body)}</main></body></html>\n"
    )


def write_report(record: Record, path: Path) -> None:
    """Write a record as one self-contained HTML file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, report_html(record).encode("utf-8", "replace").decode("utf-8"))


def _header(record: Record, views: list[ModelView], anchors: list[str]) -> str:
    settings = record.get("settings") or {}
    counts = [
        _count(len(record.get("methods") or ()), "method", "methods"), _count(len(record.get("queries") or ()), "query", "queries"),
        _count(len(views), "model", "models"), _count(settings.get("repeats") or 1, "repeat", "repeats"),
    ]
    links = [*((a, v.model_id) for a, v in zip(anchors, views, strict=True)), ("labels", "Labels"), ("settings", "Settings and provenance")]
    if len(views) > 1:
        links.insert(0, ("across", "Across models"))
    menu = "".join(f'<a href="#{anchor}">{text(title)}</a>' for anchor, title in links)
    unfinished = "" if record.get("complete", True) else '<p class="warn">This comparison is not finished: waiting cells are marked.</p>'
    return (
        f"<header><h1>Comparison of methods</h1><p>{text(', '.join(counts))} · {text(record.get('date') or 'no date')}</p>{unfinished}"
        f"<nav>{menu}</nav></header>"
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _across(views: list[ModelView]) -> str:
    drawn = inline_svg(draw_cross_model(views), "across", "speed, memory and agreement of every method on every model")
    return f'<section id="across"><h2>Across models</h2><div class="figures"><figure>{drawn}</figure></div>{cross_table(views)}</section>'
