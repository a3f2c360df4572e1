"""What a running comparison tells whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Started:
    """The first event: the record before anything ran; cells are pending, or those that an earlier run finished."""

    record: Mapping[str, Any]


@dataclass(frozen=True)
class CellStarted:
    """A method begins to answer a query; `model` and `method` are spelled as in the record."""

    model: str
    method: str
    query: str
    repeat: int


@dataclass(frozen=True)
class CellDone:
    """A cell of the record, answered, failed or cancelled; sent again when its quality figures have been added."""

    cell: Mapping[str, Any]


@dataclass(frozen=True)
class Progress:
    """Where the work is, a few times a second. seconds_left: from measured cells, None before the first."""

    fraction: float
    seconds_left: float | None
    text: str


@dataclass(frozen=True)
class Finished:
    """The last event: the whole record; its `complete` is False when the work was stopped."""

    record: Mapping[str, Any]


@dataclass(frozen=True)
class Failed:
    """The last event in place of Finished: the comparison as a whole ended, in words. Failing methods only mark their cells."""

    words: str


CompareEvent = Started | CellStarted | CellDone | Progress | Finished | Failed
