"""Question phrasings for topics. Answers stand in the corpus as they were written for it; only the ways of asking are generated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PHRASINGS = json.loads((Path(__file__).resolve().parent.parent.parent / "assets" / "corpus" / "phrasings.json").read_text(encoding="utf-8"))
TEMPLATES: dict[str, list[str]] = PHRASINGS["first"]
"""By form of the answer. {m}: the term as it stands in a sentence, {t}: the bare term, {T}: capitalised, {w}: what it is compared with,
{is}/{does}/{works}: agree in number."""
FOLLOW_UPS: dict[str, list[str]] = PHRASINGS["follow_up"]
SUMMARY: list[str] = PHRASINGS["summary"]
READING: list[str] = PHRASINGS["reading"]
_OPENINGS: list[str] = PHRASINGS["openings"]
_ENDINGS: list[str] = PHRASINGS["endings"]


def fill(template: str, topic: dict[str, Any], term: str | None = None) -> str:
    """A template with a topic's words; an alias as `term` stands for both term and mention."""
    bare, mention = term or topic["term"], term or topic["mention"]
    plural = topic["plural"] and term is None
    words = {
        "{m}": mention, "{t}": bare, "{T}": bare[:1].upper() + bare[1:], "{w}": topic["comparison"]["with"],
        "{is}": "are" if plural else "is", "{does}": "do" if plural else "does", "{works}": "work" if plural else "works",
    }
    for mark, word in words.items():
        template = template.replace(mark, word)
    return template


def as_typed(question: str, rng: np.random.Generator) -> str:
    """A question as people type it: some with an opening, some in lower case, some without the mark at the end."""
    if rng.random() < 0.4:
        opening = str(rng.choice(_OPENINGS))
        question = opening + (question[:1].lower() + question[1:] if opening[-2] in ",:" and question[1:2].islower() else question)
    if rng.random() < 0.15 and question[-1] in "?.!":
        question += str(rng.choice(_ENDINGS))
    if rng.random() < 0.15:
        question = question.lower()
    if rng.random() < 0.15 and question[-1] in "?.!":
        question = question[:-1]
    return question


def garbled(question: str, names: Sequence[str], strangers: Sequence[str], rng: np.random.Generator) -> str:
    """A question with words left out, pieces of other questions put in, and sometimes its pieces in another order; the topic's name stays whole.

    What is learned from such questions is to look for the name, whatever stands around it.

    Args:
        names: ways to write the topic's name; the first that occurs is kept.
        strangers: questions about other things, to take pieces from.
    """
    place, name = next(((i, question[i : i + len(n)]) for n in names if (i := question.lower().find(n.lower())) >= 0), (0, ""))
    pieces = [[w for w in part.split() if rng.random() > 0.25] for part in (question[:place], question[place + len(name) :])]
    if rng.random() < 0.2:
        pieces.reverse()
    for _ in range(int(rng.integers(0, 3))):
        words = str(rng.choice(strangers)).strip("?.! ").split()
        first = int(rng.integers(len(words)))
        side = pieces[int(rng.integers(2))]
        at = int(rng.integers(len(side) + 1))
        side[at:at] = words[first : first + int(rng.integers(1, 7))]
    return " ".join([*pieces[0], *([name] if name else []), *pieces[1]]) or question


def phrase(form: str, topic: dict[str, Any], rng: np.random.Generator) -> str:
    """One way to ask for `form` of a topic: a written phrasing in half of the cases, else a template."""
    written = topic["questions"].get(form, [])
    if written and rng.random() < 0.5:
        return as_typed(str(rng.choice(written)), rng)
    template = str(rng.choice(TEMPLATES[form]))
    usable_alias = topic["aliases"] and form in ("definition", "short") and rng.random() < 0.15
    return as_typed(fill(template, topic, str(rng.choice(topic["aliases"])) if usable_alias else None), rng)
