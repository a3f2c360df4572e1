"""Small pieces of HTML; everything that is not ours is escaped here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from engines.figure_style.palette import MethodStyle
from engines.label_text import LABELS, MIXED, REFERENCE


def text(value: object) -> str:
    """Text as it was typed, never run."""
    return escape(str(value), quote=True)


def plain(value: Any) -> str:
    """A setting or a provenance value in words."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(v) for v in value)
    return str(value)


def facts(values: Iterable[tuple[str, Any]]) -> str:
    """A list of names and values."""
    return '<dl class="facts">' + "".join(f"<div><dt>{text(k.replace('_', ' '))}</dt><dd>{text(plain(v))}</dd></div>" for k, v in values) + "</dl>"


def method_name(method: str, style: MethodStyle) -> str:
    """A method's name with the marker it has in every figure."""
    return f'<span class="method"><span class="mark" style="color:{style.colour}" aria-hidden="true">{style.glyph}</span>{breakable(method)}</span>'


def breakable(name: str) -> str:
    """A name that may be broken after a plus, colon, comma or underscore."""
    return re.sub(r"(?<=[+:,_])", "<wbr>", text(name))


def chip(label: str | None) -> str:
    """A label with what it claims as a tooltip; empty without one."""
    if not label:
        return ""
    meaning = REFERENCE if label == "reference" else LABELS.get(label, MIXED)
    kind = label if label in LABELS or label == "reference" else "mixed"
    return f'<span class="chip chip-{kind}" title="{text(meaning)}">{text(label)}</span>'


def defined(title: str, definition: str) -> str:
    """A title whose definition shows on hover and on focus."""
    return f'<span class="defined" tabindex="0" title="{text(definition)}">{text(title)}</span>'
