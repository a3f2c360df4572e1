"""In which order a comparison runs: methods in turns, forwards and backwards, so that no method always goes first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class CellKey(NamedTuple):
    """A cell by places in the request's models, queries, repeats and methods."""

    model: int
    query: int
    repeat: int
    method: int


@dataclass(frozen=True)
class Round:
    """One query put to every method of one model; the cells are in the order in which they run."""

    model: int
    query: int
    repeat: int
    cells: tuple[CellKey, ...]


def rounds_of_model(model: int, queries: int, repeats: int, methods: int) -> Iterator[Round]:
    """Repeat by repeat, query by query; the methods run ABBA: every second round backwards."""
    for repeat in range(repeats):
        for query in range(queries):
            order = range(methods) if (repeat + query) % 2 == 0 else reversed(range(methods))
            yield Round(model, query, repeat, tuple(CellKey(model, query, repeat, m) for m in order))


def all_cells(models: int, queries: int, repeats: int, methods: int) -> Iterator[CellKey]:
    """Every cell in the order of the record: model, repeat, query, method."""
    for model in range(models):
        for plan in rounds_of_model(model, queries, repeats, methods):
            yield from sorted(plan.cells)
