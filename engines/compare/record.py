"""The record of a comparison: plain values that every figure, table and report is made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RECORD_FILE = "multi_query_results.json"


def load_record(place: Path) -> dict[str, Any]:
    """The record in a folder, also of a run that was cut off, or in a file.

    Raises:
        InvalidRequest: there is none, or it is not one that this version reads.
    """
    raise NotImplementedError
