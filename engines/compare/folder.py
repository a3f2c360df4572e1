"""A comparison on disk: its state, and one file a finished cell, so that a kill loses the cell that runs and no other."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from core.errors import InvalidRequest
from core.files import write_text
from engines.compare.comparison import Comparison
from engines.compare.plan import CellKey
from engines.compare.request import CompareRequest
from engines.export import to_json

try:
    import fcntl
except ImportError:  # not on Windows; two runs in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

FORMAT = 1
STATE_FILE = "comparison.json"
CELLS = "cells"
_LOCK = ".comparison.lock"
_SAME_MACHINE = ("packages", "commit", "cpu", "gpu", "threads")


class RunFolder:
    """The folder of one comparison; one process at a time writes to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: IO[str] | None = None
        try:
            (folder / CELLS).mkdir(parents=True, exist_ok=True)
            self._lock = (folder / _LOCK).open("w")
        except OSError as error:
            raise InvalidRequest(f"The folder {folder} cannot be written to: {error.strerror}. Choose another.") from error
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self.close()
                raise InvalidRequest(f"Another comparison is writing to {folder}. Wait for it, or choose another folder.") from error

    def close(self) -> None:
        """Let others write to the folder."""
        if self._lock is not None:
            self._lock.close()

    def clear(self) -> None:
        """Throw away what a comparison left here; other files stay."""
        (self.folder / STATE_FILE).unlink(missing_ok=True)
        for path in (self.folder / CELLS).glob("*.json"):
            path.unlink()

    def resume(self, fresh: Comparison) -> Comparison:
        """What is here of the same comparison, else `fresh`, whose state is written.

        Raises:
            InvalidRequest: something else is here.
        """
        for scrap in (self.folder / CELLS).glob(".*"):  # a file that a kill left half written
            scrap.unlink(missing_ok=True)
        if not (self.folder / STATE_FILE).is_file():
            self.save_state(fresh)
            return fresh
        found = read_comparison(self.folder)
        _refuse_other(self.folder, found, fresh)
        found.cells = {key: cell for key, cell in found.cells.items() if cell["status"] == "done"}  # what failed is tried again
        return found

    def save_state(self, comparison: Comparison) -> None:
        """Write all but the cells."""
        write_text(self.folder / STATE_FILE, to_json({
            "format": FORMAT, "date": comparison.date, "request": comparison.request.values(), "provenance": comparison.provenance,
            "models": comparison.models, "methods": comparison.methods,
        }))

    def save_cell(self, key: CellKey, cell: Mapping[str, Any]) -> None:
        """Write one cell."""
        write_text(self.folder / CELLS / _cell_name(key), to_json(cell))


def _cell_name(key: CellKey) -> str:
    return "-".join(f"{place:04d}" for place in key) + ".json"


def read_comparison(folder: Path) -> Comparison:
    """The comparison in a folder, as far as it came. A cell that cannot be read counts as not run.

    Raises:
        InvalidRequest: there is none, or its state cannot be read.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise InvalidRequest(f"The comparison in {folder} is of format {str(state['format'])[:20]}; this version reads {FORMAT}. Choose another folder.")
        comparison = Comparison(
            CompareRequest.from_values(state["request"]), state["date"], state["provenance"],
            {int(k): v for k, v in state["models"].items()}, {int(k): v for k, v in state["methods"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"The comparison in {folder} cannot be read ({type(error).__name__}). Start afresh in it, or choose another folder.") from error
    wanted = {_cell_name(key): key for key in comparison.planned()}
    for path in sorted((folder / CELLS).glob("[0-9]*.json")):
        cell = _read_cell(path)
        if cell is not None and path.name in wanted:
            comparison.cells[wanted[path.name]] = cell
    return comparison


def _read_cell(path: Path) -> dict[str, Any] | None:
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        return cell if isinstance(cell, dict) and {"status", "text", "token_ids", "scored"} <= set(cell) else None
    except (OSError, ValueError):
        log.warning("%s cannot be read; its cell runs again", path.name)
        return None


def _refuse_other(folder: Path, found: Comparison, asked: Comparison) -> None:
    """Raises InvalidRequest when the folder's cells were asked for otherwise, or measured by other code or on another machine."""
    there, here = _flat(found.request.values()), _flat(asked.request.values())
    changed = [f"{name} is {_shown(there.get(name))} there, {_shown(here.get(name))} here" for name in here if there.get(name) != here.get(name)]
    changed += [f"{name} was {_shown(found.provenance.get(name))}, now {_shown(asked.provenance.get(name))}"
                for name in _SAME_MACHINE if found.provenance.get(name) != asked.provenance.get(name)]
    if changed:
        raise InvalidRequest(f"{folder} holds another comparison: {'; '.join(changed[:3])}. Choose another folder, or start afresh in this one.")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in values.items() if k != "sampling"}, **values["sampling"]}


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
