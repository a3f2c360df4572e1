"""Comparisons over a pool of engines: started, watched and stopped."""

from __future__ import annotations

import datetime
import queue
import threading
from collections.abc import Iterator
from dataclasses import replace

from core.progress import Stop
from core.provenance import provenance
from engines.compare.comparison import Comparison
from engines.compare.events import CompareEvent, Failed, Finished, Progress, Started
from engines.compare.folder import RunFolder
from engines.compare.record import compare_record
from engines.compare.request import CompareRequest, checked_request
from engines.compare.results import clear_results, write_results
from engines.compare.runner import Runner
from engines.failures import in_words
from engines.gate import DeviceGate
from engines.pool import EnginePool

_TICK_S = 0.5


class CompareService:
    """Compares over a pool of engines; the gate lets one answer at a time onto the device, so that chats go on in between."""

    def __init__(self, pool: EnginePool, gate: DeviceGate | None = None) -> None:
        self.pool = pool
        self.gate = gate or DeviceGate()

    def stream(self, request: CompareRequest, stop: Stop | None = None) -> Iterator[CompareEvent]:
        """Events as they happen, `Finished` or `Failed` last. Closing the iterator stops the engine at its next token.

        With an output folder, the record and its tables are written there at the end, also when the work was stopped.

        Raises:
            InvalidRequest: at once, when the request or its folder is unusable.
        """
        checked = checked_request(request, self.pool.device)
        fresh = Comparison(checked, datetime.date.today().isoformat(), provenance())
        if checked.output is None:
            return self._events(fresh, None, stop or Stop())
        folder = RunFolder(checked.output)
        try:
            if checked.fresh:
                folder.clear()
                clear_results(folder.folder)
            comparison = folder.resume(fresh)
        except BaseException:
            folder.close()
            raise
        return self._events(comparison, folder, stop or Stop())

    def _events(self, comparison: Comparison, folder: RunFolder | None, stop: Stop) -> Iterator[CompareEvent]:
        events: queue.Queue[CompareEvent | None] = queue.Queue()

        def work() -> None:
            try:
                events.put(self._run(comparison, folder, stop, events))
            except Exception as error:  # whoever watches must hear of it
                events.put(Failed(in_words(error)))
            finally:
                if folder is not None:
                    folder.close()
                events.put(None)

        thread = threading.Thread(target=work, name="compare", daemon=True)
        thread.start()
        try:
            yield from _until_the_end(events)
        finally:
            stop.request()
            thread.join()

    def _run(self, comparison: Comparison, folder: RunFolder | None, stop: Stop, events: queue.Queue[CompareEvent | None]) -> CompareEvent:
        events.put(Started(compare_record(comparison)))
        Runner(self.pool, self.gate, comparison, folder, stop, events.put).run()
        record = compare_record(comparison)
        if folder is not None:
            write_results(record, folder.folder)
        return Finished(record)


def _until_the_end(events: queue.Queue[CompareEvent | None]) -> Iterator[CompareEvent]:
    """The events; while nothing new comes the last progress is told again, so that a watcher who left is noticed."""
    last = Progress(0.0, None, "starting")
    while True:
        try:
            event = events.get(timeout=_TICK_S)
        except queue.Empty:
            last = replace(last, seconds_left=None if last.seconds_left is None else max(0.0, last.seconds_left - _TICK_S))
            yield last
            continue
        if event is None:
            return
        last = event if isinstance(event, Progress) else last
        yield event
