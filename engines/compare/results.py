"""A comparison's record as files: JSON with everything, and two tables for spreadsheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.files import write_text
from engines.compare.record import RECORD_FILE
from engines.export import csv_text, to_json
from engines.metrics import METRICS

CELLS_FILE, ROWS_FILE = "multi_query_results.csv", "multi_query_rows.csv"
_SPREAD = ("median", "p10", "p90", "n")


def write_results(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the record, a table of its cells and a table of its rows; returns the files."""
    files = {RECORD_FILE: to_json(record), CELLS_FILE: cells_csv(record), ROWS_FILE: rows_csv(record)}
    for name, text in files.items():
        write_text(folder / name, text)
    return [folder / name for name in files]


def clear_results(folder: Path) -> None:
    """Take away the files of an earlier record."""
    for name in (RECORD_FILE, CELLS_FILE, ROWS_FILE):
        (folder / name).unlink(missing_ok=True)


def cells_csv(record: Mapping[str, Any]) -> str:
    """One row a cell, question and answer included; empty where a figure was not measured."""
    questions = {q["id"]: q for q in record["queries"]}
    head = ("model", "method", "query", "kind", "repeat", "status", "error", "question", "text", "prompt")
    rows: list[Sequence[Any]] = [[*head, *METRICS]]
    for cell in record["cells"]:
        query = questions[cell["query"]]
        values = {**cell, "kind": query["kind"], "question": query["question"]}
        rows.append([*(values[name] for name in head), *(cell["metrics"].get(name) for name in METRICS)])
    return csv_text(rows)


def rows_csv(record: Mapping[str, Any]) -> str:
    """One row a method and model: median, 10th and 90th percentile and number of cells of each figure."""
    rows: list[Sequence[Any]] = [["model", "method", "label", "done", "failed", "error", *(f"{name}_{part}" for name in METRICS for part in _SPREAD)]]
    for row in record["rows"]:
        figures = [row["metrics"].get(name, {}).get(part) for name in METRICS for part in _SPREAD]
        rows.append([*(row[name] for name in ("model", "method", "label", "done", "failed", "error")), *figures])
    return csv_text(rows)
