"""A comparison's record as figures read it: one view a model, only numbers that are in the record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.methods import BASELINE
from engines.metrics import METRICS

Record = Mapping[str, Any]
ABSENT = {"measured": "not measured", "failed": "failed", "cancelled": "cancelled", "waiting": "waiting"}
"""What stands where a method's figure would be, by the method's state."""


@dataclass(frozen=True)
class Spread:
    """Median of a metric over `count` answers, and its 10th and 90th percentile where they are known."""

    median: float
    p10: float | None
    p90: float | None
    count: int | None

    @property
    def highest(self) -> float:
        """The right end of its error bar."""
        return self.median if self.p90 is None else max(self.median, self.p90)


@dataclass(frozen=True)
class MethodRow:
    """One method on one model. `planned` counts its cells, done or not; `cancelled` those that will not run."""

    method: str
    label: str | None
    error: str | None
    done: int
    failed: int
    planned: int
    cancelled: int
    metrics: Mapping[str, Spread]

    @property
    def state(self) -> str:
        """measured: there is at least one answer. failed, cancelled: there will be none. waiting: there is none yet."""
        if self.done or self.metrics:
            return "measured"
        if self.error or self.failed:
            return "failed"
        return "cancelled" if self.planned and self.cancelled == self.planned else "waiting"


@dataclass(frozen=True)
class ModelView:
    """Everything of one model: rows in the record's order, cells that are done or failed, and what they were asked."""

    model: Mapping[str, Any]
    rows: tuple[MethodRow, ...]
    cells: tuple[Mapping[str, Any], ...]
    record: Record

    @property
    def model_id(self) -> str:
        """The model's name as it was asked for."""
        return str(self.model.get("model_id", ""))

    @property
    def methods(self) -> tuple[str, ...]:
        """Method names in the record's order."""
        return tuple(r.method for r in self.rows)

    @property
    def baseline(self) -> MethodRow | None:
        """The baseline's row, where it was asked for."""
        return next((r for r in self.rows if r.method == BASELINE), None)

    @property
    def queries(self) -> Sequence[Mapping[str, Any]]:
        """The queries in their order."""
        return self.record.get("queries") or ()

    def spread(self, method: str, metric: str) -> Spread | None:
        """A method's figure; None where it was not measured."""
        return next((r.metrics.get(metric) for r in self.rows if r.method == method), None)

    def measured(self, metric: str) -> bool:
        """Whether any method has this metric."""
        return any(metric in r.metrics for r in self.rows)

    def cells_of(self, method: str, query: str | None = None, status: str = "done") -> list[Mapping[str, Any]]:
        """A method's cells with a status, of one query or of all, in the record's order."""
        return [c for c in self.cells if c.get("method") == method and c.get("status") == status and query in (None, c.get("query"))]

    def values(self, method: str, metric: str, query: str | None = None) -> list[float]:
        """A metric of each of a method's answers that has it."""
        found = (number((c.get("metrics") or {}).get(metric)) for c in self.cells_of(method, query))
        return [v for v in found if v is not None]

    def sorted_methods(self, metric: str) -> list[str]:
        """The baseline first, then the best in `metric` first, then those without it in the record's order."""
        sign = -1 if definition(self.record, metric)["better"] == "high" else 1

        def place(name: str) -> tuple[bool, bool, float]:
            found = self.spread(name, metric)
            return name != BASELINE, found is None, sign * found.median if found else 0.0

        return sorted(self.methods, key=place)


def number(value: Any) -> float | None:
    """`value` as a finite number; None for everything else, truth values included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def spread_of(value: Any) -> Spread | None:
    """A row's entry; None without a finite median."""
    if not isinstance(value, Mapping):
        return None
    median = number(value.get("median"))
    if median is None:
        return None
    count = number(value.get("n"))
    return Spread(median, number(value.get("p10")), number(value.get("p90")), None if count is None else int(count))


def definition(record: Record, metric: str) -> dict[str, Any]:
    """Definition, unit, title and better direction of a metric: the record's own, else this version's."""
    found: Mapping[str, Any] = (record.get("definitions") or {}).get(metric) or METRICS.get(metric) or {}
    return {"definition": found.get("definition") or "", "unit": found.get("unit") or "", "better": found.get("better"), "title": found.get("title") or metric}


def model_views(record: Record) -> list[ModelView]:
    """A view of each of the record's models, in order; works while cells are missing or pending."""
    return [_view(record, m) for m in record.get("models") or ()]


def model_view(record: Record, model_id: str | None = None) -> ModelView | None:
    """The view of one model, of the first when none is named; None where the record has no such model."""
    return next((v for v in model_views(record) if model_id in (None, v.model_id)), None)


def _view(record: Record, model: Mapping[str, Any]) -> ModelView:
    model_id = model.get("model_id")
    cells = tuple(c for c in record.get("cells") or () if c.get("model") == model_id)
    rows = {r.get("method"): r for r in record.get("rows") or () if r.get("model") == model_id}
    names = _method_names(record.get("methods") or (), rows, cells)
    return ModelView(model, tuple(_row(n, rows.get(n) or {}, [c for c in cells if c.get("method") == n]) for n in names), cells, record)


def _method_names(methods: Iterable[Mapping[str, Any]], rows: Mapping[Any, Any], cells: Iterable[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys([*(m.get("method") for m in methods), *rows, *(c.get("method") for c in cells)])
    return [str(n) for n in names if n is not None]


def _row(method: str, row: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> MethodRow:
    counts = {s: sum(c.get("status") == s for c in cells) for s in ("done", "failed", "cancelled")}
    spreads = {name: found for name, value in (row.get("metrics") or {}).items() if (found := spread_of(value))}
    done, failed = (counts[s] or int(row.get(s) or 0) for s in ("done", "failed"))
    return MethodRow(method, row.get("label"), row.get("error"), done, failed, len(cells), counts["cancelled"], spreads)


def failure_notes(view: ModelView) -> list[str]:
    """What failed and why, a sentence each: whole methods, and single answers of others."""
    notes = []
    for row in view.rows:
        first = next((c.get("error") for c in view.cells_of(row.method, status="failed")), None)
        reason = str(row.error or first or "no reason recorded").strip().rstrip(".")
        if row.state == "failed":
            notes.append(f"{row.method} failed: {reason}.")
        elif row.failed:
            notes.append(f"{row.method}: {row.failed} of {row.planned or row.done + row.failed} answers failed: {reason}.")
    return notes
