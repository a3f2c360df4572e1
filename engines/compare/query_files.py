"""Queries from a user's CSV, JSON or text file: all of them, or a message with the line and what to do."""

from __future__ import annotations

from pathlib import Path

from engines.compare.queries import Query

MAX_QUERIES = 1_000
MAX_CHARACTERS = 20_000


def read_queries(source: Path | bytes, name: str | None = None) -> tuple[Query, ...]:
    """All queries of a file; `name` says the format by its ending: .csv, .json or .txt.

    Raises:
        InvalidRequest: anything is wrong with it; nothing is taken then.
    """
    raise NotImplementedError
