"""The state of a comparison: what was asked, what is known of the models, and the cells so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from engines.compare.plan import CellKey, Round, all_cells, rounds_of_model
from engines.compare.request import CompareRequest

ANSWERED, FAILED, CANCELLED, PENDING = "done", "failed", "cancelled", "pending"


@dataclass
class Comparison:
    """A checked request and what came of it, as plain values.

    models: place of a model -> its entry in the record, once it was loaded. methods: place of a model -> an entry a method.
    cells: what ran; a cell is answered first, and scored once its round's baseline has answered.
    """

    request: CompareRequest
    date: str
    provenance: dict[str, Any]
    models: dict[int, dict[str, Any]] = field(default_factory=dict)
    methods: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    cells: dict[CellKey, dict[str, Any]] = field(default_factory=dict)

    def planned(self) -> Iterator[CellKey]:
        """Every cell that was asked for, in the order of the record."""
        asked = self.request
        return all_cells(len(asked.models), len(asked.queries), asked.repeats, len(asked.methods))

    def rounds(self, model: int) -> Iterator[Round]:
        """The rounds of a model in the order in which they run."""
        return rounds_of_model(model, len(self.request.queries), self.request.repeats, len(self.request.methods))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The models' names in the record: of a folder its last part, as long as that is no other's name."""
        names = [Path(name).expanduser().name if _is_folder(name) else name for name in self.request.models]
        return tuple(name if names.count(name) == 1 else f"{name} ({place + 1})" for place, name in enumerate(names))

    def status(self, key: CellKey) -> str:
        """done, failed, cancelled or pending."""
        return str(self.cells[key]["status"]) if key in self.cells else PENDING

    def answered(self, key: CellKey) -> bool:
        """Whether a cell has its answer."""
        return self.status(key) == ANSWERED

    def finished(self, key: CellKey) -> bool:
        """Whether nothing is left to do for a cell."""
        return self.status(key) == FAILED or (self.answered(key) and bool(self.cells[key]["scored"]))


def _is_folder(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or "\\" in name or Path(name).is_dir()
