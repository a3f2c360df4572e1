"""Answers side by side, differences to the baseline's marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.answer_diff import marked_html
from engines.compare_report.html import method_name, text
from engines.compare_view import ModelView, number
from engines.figure_style.palette import MethodStyle, method_styles
from engines.methods import BASELINE
from engines.metric_text import format_value

LEGEND = "<p class=\"note\"><del>only in the baseline's answer</del> <ins>not in the baseline's answer</ins>. Methods that answered alike stand together.</p>"


def answers_section(view: ModelView) -> str:
    """Each query with the answers to it, grouped by what they say; the first is open."""
    blocks = [
        f'<details class="query"{" open" if place == 0 else ""}><summary>{text(_short(query))}</summary>{_question(query)}'
        f"{answer_cards(view, str(query.get('id')))}</details>"
        for place, query in enumerate(view.queries)
    ]
    return LEGEND + "".join(blocks)


def answer_cards(view: ModelView, query: str) -> str:
    """The answers to one query side by side, each marked against the baseline's; methods that said the same share a card."""
    return f'<div class="cards">{"".join(_cards(view, query, method_styles(view.methods)))}</div>'


def _short(query: Mapping[str, Any]) -> str:
    question = " ".join(str(query.get("question") or "").split())
    return question if len(question) <= 110 else question[:107] + "…"


def _question(query: Mapping[str, Any]) -> str:
    question, keywords = str(query.get("question") or ""), query.get("keywords") or ()
    whole = f'<p class="question">{text(question)}</p>' if len(question) > 110 else ""
    return whole + (f'<p class="note">expected keywords: {text(", ".join(map(str, keywords)))}</p>' if keywords else "")


def _cards(view: ModelView, query: str, styles: Mapping[str, MethodStyle]) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for method in sorted(view.methods, key=lambda m: m != BASELINE):
        for cell in [c for c in view.cells if c.get("method") == method and c.get("query") == query]:
            if method not in groups.setdefault(_said(cell), []):
                groups[_said(cell)].append(method)
    reference = next((str(c.get("text") or "") for c in view.cells_of(BASELINE, query)), None)
    return [_card(view, query, said, methods, reference, styles) for said, methods in groups.items()]


def _said(cell: Mapping[str, Any]) -> tuple[str, str]:
    """What a cell holds: a status and its text, or the reason why there is none."""
    status = str(cell.get("status"))
    return status, str((cell.get("error") if status == "failed" else cell.get("text")) or "")


def _card(view: ModelView, query: str, said: tuple[str, str], methods: list[str], reference: str | None, styles: Mapping[str, MethodStyle]) -> str:
    status, words = said
    names = " ".join(_name(view, query, m, said, styles) for m in methods)
    if status == "done" and words.strip():
        body = text(words) if reference is None or words == reference else marked_html(reference, words)
        note = '<p class="note">the baseline\'s answer, character by character</p>' if words == reference and methods != [BASELINE] else ""
        return f'<article><header>{names}</header><div class="answer">{body}</div>{note}</article>'
    reason = {"done": "an empty answer", "failed": f"failed: {words or 'no reason recorded'}", "cancelled": "cancelled"}.get(status, "waiting")
    return f'<article class="absent"><header>{names}</header><p>{text(reason)}</p></article>'


def _name(view: ModelView, query: str, method: str, said: tuple[str, str], styles: Mapping[str, MethodStyle]) -> str:
    cells = [c for c in view.cells if c.get("method") == method and c.get("query") == query]
    alike = [c for c in cells if _said(c) == said]
    share = number((alike[0].get("metrics") or {}).get("agreement_share"))
    facts = [f"{len(alike)} of {len(cells)} runs" if len(alike) < len(cells) else "", f"agreement {format_value(share, 'share')}" if share is not None and method != BASELINE else ""]
    shown = ", ".join(f for f in facts if f)
    return f'<span class="who">{method_name(method, styles[method])}{f" <small>{text(shown)}</small>" if shown else ""}</span>'
