"""A comparison's record while it fills, from the events of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.compare.comparison import PENDING
from engines.compare.events import CellDone, CellStarted, CompareEvent, Finished, Progress, Started
from engines.compare.record import row_of


class LiveRecord:
    """What is known so far. `record` has the form of a finished one; cells that have not run are pending.

    running: model, method, query and repeat of the cell that is being answered. progress: the last one told.
    """

    def __init__(self) -> None:
        self.record: dict[str, Any] = {}
        self.running: tuple[str, str, str, int] | None = None
        self.progress = Progress(0.0, None, "starting")
        self._places: dict[tuple[str, str, str, int], int] = {}

    def apply(self, event: CompareEvent) -> None:
        """Take in one event."""
        if isinstance(event, Started):
            self._take(event.record)
        elif isinstance(event, Finished):
            self._take(event.record)
            self.progress = Progress(1.0, 0.0, "finished") if event.record["complete"] else Progress(self.progress.fraction, None, "stopped")
        elif isinstance(event, CellStarted):
            self.running = (event.model, event.method, event.query, event.repeat)
        elif isinstance(event, CellDone):
            self._put(event.cell)
        elif isinstance(event, Progress):
            self.progress = event

    def _take(self, record: Mapping[str, Any]) -> None:
        self.record, self.running = {**record, "cells": list(record["cells"]), "rows": list(record["rows"])}, None
        self._places = {_key(cell): place for place, cell in enumerate(record["cells"])}

    def _put(self, cell: Mapping[str, Any]) -> None:
        """A cell changed: its row's medians change with it."""
        cells = self.record["cells"]
        cells[self._places[_key(cell)]] = dict(cell)
        if self.running == _key(cell) and cell["status"] != PENDING:
            self.running = None
        for place, row in enumerate(self.record["rows"]):
            if (row["model"], row["method"]) == (cell["model"], cell["method"]):
                own = [c for c in cells if (c["model"], c["method"]) == (cell["model"], cell["method"])]
                self.record["rows"][place] = row_of(row["model"], row["method"], own)


def _key(cell: Mapping[str, Any]) -> tuple[str, str, str, int]:
    return cell["model"], cell["method"], cell["query"], cell["repeat"]
