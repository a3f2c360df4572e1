"""What a comparison asks: questions with the words that a good answer holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MAX_QUERIES = 1_000
MAX_CHARACTERS = 20_000
"""Longest question."""
BUILT_IN_FILE = Path(__file__).resolve().parents[2] / "assets" / "queries.json"


@dataclass(frozen=True)
class Query:
    """One question. `id` names it in results; keywords: stems are looked for in the answer, as `keyword_recall` does."""

    id: str
    kind: str
    question: str
    keywords: tuple[str, ...] = ()


@cache
def built_in_queries() -> tuple[Query, ...]:
    """The five questions that every comparison can start from."""
    return tuple(Query(q["id"], q["kind"], q["question"], tuple(q["keywords"])) for q in json.loads(BUILT_IN_FILE.read_text(encoding="utf-8")))
