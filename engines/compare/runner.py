"""Runs what is missing of a comparison, in one thread, cell by cell; each failure is its cell's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any
from weakref import WeakKeyDictionary

from core import progress as core_progress
from core.errors import EngineBusy, FuseboxError, InvalidRequest, PromptTooLong
from core.loading import locate
from core.progress import Stop
from engines.compare.cells import answered_cell, failed_cell, kept_answer, public_cell, scored_cell
from engines.compare.comparison import CANCELLED, Comparison
from engines.compare.events import CellDone, CellStarted, CompareEvent, Progress
from engines.compare.folder import RunFolder
from engines.compare.pace import Pace
from engines.compare.plan import CellKey, Round
from engines.engine import Engine
from engines.failures import in_words
from engines.gate import DeviceGate
from engines.methods import method_entry
from engines.pool import AUTO, EnginePool
from engines.prompting import Message, build_prompt
from engines.quality import of_answer

_BUSY_S = 0.2


class Stopped(Exception):
    """Stop was requested while an engine was being built."""


class Runner:
    """One run over one comparison. `emit` gets the events; `folder` keeps the cells, None keeps nothing."""

    def __init__(self, pool: EnginePool, gate: DeviceGate, comparison: Comparison, folder: RunFolder | None, stop: Stop, emit: Callable[[CompareEvent], None]) -> None:
        self.pool, self.gate, self.comparison, self.folder, self.stop, self.emit = pool, gate, comparison, folder, stop, emit
        self.request = comparison.request
        self._pace = Pace(comparison)
        self._dtypes: dict[int, str] = {}
        self._revisions: dict[int, str | None] = {}
        self._refused: dict[tuple[int, int], str] = {}
        self._warm: WeakKeyDictionary[Engine, set[int]] = WeakKeyDictionary()

    def run(self) -> None:
        """Run what is missing, model by model, until done or stopped.

        Raises:
            InvalidRequest: a model is no longer the one that earlier cells were measured on.
        """
        try:
            for model in range(len(self.request.models)):
                rounds = [r for r in self.comparison.rounds(model) if not all(map(self.comparison.finished, r.cells))]
                if rounds and not self.stop.requested and self._open_model(model, [k for r in rounds for k in r.cells]):
                    for plan in rounds:
                        self._run_round(plan)
        except Stopped:
            return

    def _open_model(self, model: int, keys: list[CellKey]) -> bool:
        """Load the baseline and find out what the methods stand for on it; False, its cells marked, when it cannot be loaded."""
        known = self.comparison.models.get(model)
        if known is not None:  # the same number format and commit as the cells that are there
            self._dtypes[model] = known["dtype"]
            self._revisions[model] = known["revision"] if known["source"] == "hub" else None
        try:
            if not self.pool.holds(self.request.models[model], revision=self._revisions.get(model), dtype=self._dtype(model)):
                # A download takes minutes and no core: it does not keep others from the device.
                locate(self.request.models[model], self._revisions.get(model), self._progress(0), self.pool.allow_local)
            with self._device() as held:
                if not held:
                    return False
                engine = self.pool.get(self.request.models[model], revision=self._revisions.get(model), dtype=self._dtype(model), progress=self._progress(0))
        except Stopped:
            raise
        except Exception as error:  # a model's failure must not take the others with it
            for key in keys:
                self._keep(key, failed_cell(in_words(error)))
            return False
        self._note_model(model, engine, known)
        return True

    def _note_model(self, model: int, engine: Engine, known: Mapping[str, Any] | None) -> None:
        info = engine.bundle.info
        if known is not None:
            if (info.revision, info.dtype) != (known["revision"], known["dtype"]):
                raise InvalidRequest(f"{self.request.models[model]} is not the model that the folder's cells were measured on: revision {known['revision']}, now {info.revision}. Choose another folder.")
            return
        choice = self.pool.dtype_choice(self.request.models[model], dtype=self._dtype(model))
        self.comparison.models[model] = {"revision": info.revision, "dtype": info.dtype, "source": info.source, "dtype_choice": asdict(choice) if choice else None}
        self.comparison.methods[model] = [method_entry(method, engine.bundle) for method in self.request.methods]
        if self.folder is not None:
            self.folder.save_state(self.comparison)

    def _run_round(self, plan: Round) -> None:
        """Answer the query with every method, then score all against the baseline's answer."""
        for key in plan.cells:
            if not self.stop.requested and not self.comparison.answered(key):
                self._answer(key)
        for key in plan.cells:
            if not self.stop.requested and self.comparison.answered(key) and not self.comparison.finished(key):
                self._score(key)

    def _answer(self, key: CellKey) -> None:
        query = self.request.queries[key.query]
        self.emit(CellStarted(self.comparison.labels[key.model], self.request.methods[key.method], query.id, key.repeat))
        self._tell(key, "answering")
        try:
            with self._device() as held:
                if not held:
                    return
                engine = self._engine(key)
                self._warm_up(engine, key)
                began = time.perf_counter()
                answer = engine.answer(self._messages(key), self.request.sampling, self.stop, _ignore)
                self._pace.measured("answer", key, time.perf_counter() - began)
        except Stopped:
            raise
        except Exception as error:  # a cell's failure must not take the others with it
            self._keep(key, failed_cell(in_words(error)))
        else:
            self._keep(key, answered_cell(answer, query.keywords))

    def _score(self, key: CellKey) -> None:
        self._tell(key, "scoring")
        cell, baseline = self.comparison.cells[key], key._replace(method=0)
        if not self.comparison.answered(baseline) or not self.comparison.cells[baseline]["token_ids"]:
            self._keep(key, scored_cell(cell, {}, "the baseline gave no answer to compare with"))
            return
        try:
            with self._device() as held:
                if not held:
                    return
                engine = self._engine(key)
                began = time.perf_counter()
                prompt = build_prompt(engine.bundle, self._messages(key))
                quality = of_answer(engine, prompt.ids, kept_answer(cell), kept_answer(self.comparison.cells[baseline]), self.stop)
                self._pace.measured("score", key, time.perf_counter() - began)
        except Stopped:
            raise
        except Exception as error:  # the answer stands, only its score is missing
            self._keep(key, scored_cell(cell, {}, f"not scored: {in_words(error)}"))
        else:
            if not self.stop.requested:  # else it is of a part of the tokens
                self._keep(key, scored_cell(cell, quality))

    def _engine(self, key: CellKey) -> Engine:
        """The cell's engine; a method that could not be built once is not tried again in this run."""
        method = self.request.methods[key.method]
        place = (key.model, key.method)
        if place in self._refused:
            raise InvalidRequest(self._refused[place])
        try:
            engine = self._get(key.model, method, key)
            if engine.bundle.info.dtype != self.comparison.models[key.model]["dtype"]:  # loaded again, and the timing came out otherwise
                self._dtypes[key.model] = self.comparison.models[key.model]["dtype"]
                engine = self._get(key.model, method, key)
        except FuseboxError as error:
            self._refused[place] = str(error)
            raise
        return engine

    def _get(self, model: int, method: str, key: CellKey) -> Engine:
        return self.pool.get_method(method, self.request.models[model], revision=self._revisions.get(model), dtype=self._dtype(model), progress=self._progress(key.method))

    def _dtype(self, model: int) -> str:
        return self._dtypes.get(model, self.request.dtype or AUTO)

    def _warm_up(self, engine: Engine, key: CellKey) -> None:
        """Two tokens of an engine's first answer to a query, untimed: the first call with a new length pays for one-time work."""
        done = self._warm.setdefault(engine, set())
        if key.query in done or self.stop.requested:
            return
        with suppress(PromptTooLong):  # said by the answer itself, with its numbers
            engine.answer(self._messages(key), replace(self.request.sampling, max_new_tokens=2, ignore_eos=True), self.stop, _ignore)
        done.add(key.query)

    def _messages(self, key: CellKey) -> list[Message]:
        return [{"role": "user", "content": self.request.queries[key.query].question}]

    @contextmanager
    def _device(self) -> Iterator[bool]:
        """The device for one cell; False when stopped while waiting. A full row is waited for: the comparison has time."""
        with ExitStack() as stack:
            held = False
            while not held and not self.stop.requested:
                try:
                    held = stack.enter_context(self.gate.hold(self.stop))
                except EngineBusy:
                    time.sleep(_BUSY_S)
            yield held

    def _keep(self, key: CellKey, cell: dict[str, Any]) -> None:
        """Note a cell, on disk too unless it was cancelled, and tell."""
        self.comparison.cells[key] = cell
        self._pace.update(key)
        if self.folder is not None and cell["status"] != CANCELLED:
            self.folder.save_cell(key, cell)
        self.emit(CellDone(public_cell(self.comparison, key)))
        self._tell(key, "done")

    def _tell(self, key: CellKey, what: str) -> None:
        self.emit(Progress(self._pace.fraction, self._pace.seconds_left, f"{self.request.methods[key.method]}: {what}, query {self.request.queries[key.query].id}"))

    def _progress(self, method: int) -> core_progress.Progress:
        """Progress of building an engine; building ends there when stop was requested."""

        def report(fraction: float, text: str) -> None:
            if self.stop.requested:
                raise Stopped
            self.emit(Progress(self._pace.fraction, self._pace.seconds_left, f"{self.request.methods[method]}: {text}"))

        return report


def _ignore(text: str) -> None:
    """Nobody watches a cell's text as it comes."""
