"""The record of a comparison: plain values that every figure, table and report is made from."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import InvalidRequest
from engines.compare.cells import public_cell
from engines.compare.comparison import ANSWERED, FAILED, Comparison
from engines.compare.folder import STATE_FILE, read_comparison
from engines.export import plain
from engines.methods import BASELINE, method_entry
from engines.metrics import METRICS, percentile

FORMAT = 1
RECORD_FILE = "multi_query_results.json"
MIXED = "mixed"
"""The label of a method whose techniques differ in how real their savings are."""


def compare_record(comparison: Comparison) -> dict[str, Any]:
    """Everything of a comparison, finished or not; `None` is a figure that was not measured."""
    request = comparison.request
    cells = [public_cell(comparison, key) for key in comparison.planned()]
    labels = comparison.labels
    by_row: dict[tuple[str, str], list[dict[str, Any]]] = {(model, method): [] for model in labels for method in request.methods}
    for cell in cells:
        by_row[cell["model"], cell["method"]].append(cell)
    unknown = {"revision": None, "dtype": None, "source": None, "dtype_choice": None}
    return dict(plain({
        "format": FORMAT, "date": comparison.date, "complete": all(comparison.finished(key) for key in comparison.planned()),
        "settings": _settings(comparison, labels),
        "queries": request.values()["queries"],
        "methods": _methods(comparison, labels),
        "models": [{"model_id": label, **(comparison.models.get(place) or unknown)} for place, label in enumerate(labels)],
        "cells": cells,
        "rows": [row_of(model, method, own) for (model, method), own in by_row.items()],
        "definitions": {name: dict(meta) for name, meta in METRICS.items()},
        "provenance": comparison.provenance,
    }))


def _settings(comparison: Comparison, labels: Sequence[str]) -> dict[str, Any]:
    values = comparison.request.values()
    kept = {k: values[k] for k in ("methods", "repeats", "dtype", "device", "quick")}
    return {**kept, "models": list(labels), **values["sampling"]}


def _methods(comparison: Comparison, labels: Sequence[str]) -> list[dict[str, Any]]:
    """An entry a method: as on the first model, and on each model under `by_model`; a model that is not loaded yet has none there."""
    entries = []
    for place, method in enumerate(comparison.request.methods):
        on = {labels[model]: methods[place] for model, methods in sorted(comparison.methods.items())}
        first = next(iter(on.values()), None) or method_entry(method)
        entries.append({**first, "by_model": {label: {k: v for k, v in entry.items() if k != "method"} for label, entry in on.items()}})
    return entries


def row_of(model: str, method: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One method on one model: median, spread and number of every figure over its answered cells."""
    done = [c for c in cells if c["status"] == ANSWERED]
    failed = [c for c in cells if c["status"] == FAILED]
    return {
        "model": model, "method": method, "label": _label(method, done), "error": failed[0]["error"] if failed and len(failed) == len(cells) else None,
        "done": len(done), "failed": len(failed), "metrics": {name: spread for name in METRICS if (spread := _spread([c["metrics"][name] for c in done]))},
    }


def _spread(values: Sequence[Any]) -> dict[str, Any] | None:
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if not numbers:
        return None
    return {"median": statistics.median(numbers), "p10": percentile(numbers, 0.1), "p90": percentile(numbers, 0.9), "n": len(numbers)}


def _label(method: str, done: Sequence[Mapping[str, Any]]) -> str | None:
    if method == BASELINE:
        return "reference"
    labels = {report["label"] for cell in done for report in cell["reports"]}
    return MIXED if len(labels) > 1 else next(iter(labels), None)


def load_record(place: Path) -> dict[str, Any]:
    """The record in a folder, also of a run that was cut off, or in a file.

    Raises:
        InvalidRequest: there is none, or it is not one that this version reads.
    """
    if place.is_dir() and (place / STATE_FILE).is_file():
        return compare_record(read_comparison(place))
    file = place / RECORD_FILE if place.is_dir() else place
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"There is no comparison in {place}: {file.name} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise InvalidRequest(f"{file} is no JSON text, so it is no comparison.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or not {"cells", "rows", "settings"} <= set(record):
        raise InvalidRequest(f"{file} is no comparison of format {FORMAT}.")
    return record
