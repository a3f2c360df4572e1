"""Comparisons by id: started by whoever asks, watched, stopped, gone on with, and kept for a while."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from core.errors import EngineBusy, InvalidRequest
from core.progress import Stop
from engines.compare.events import CompareEvent, Failed
from engines.compare.live import LiveRecord
from engines.compare.request import CompareRequest, checked_request
from engines.compare.service import CompareService


@dataclass
class Job:
    """One comparison. id: known only to who started it. folder: its cells and files. failed: why it ended as a whole."""

    id: str
    request: CompareRequest
    folder: Path
    live: LiveRecord = field(default_factory=LiveRecord)
    stop: Stop = field(default_factory=Stop)
    running: bool = False
    failed: str | None = None
    used_s: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self.live.record.get("complete"))


class CompareJobs:
    """The comparisons of one running app. Finished ones go when there are too many, or when nobody has looked for `ttl_s`."""

    def __init__(self, service: CompareService, capacity: int = 64, ttl_s: float = 6 * 3600.0) -> None:
        self.service, self.capacity, self.ttl_s = service, capacity, ttl_s
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()
        self._root: Path | None = None

    def open(self, request: CompareRequest, again: str | None = None) -> Job:
        """A job for the request: the one named `again` when it was cut off and asked the same, else a new one.

        Raises:
            InvalidRequest, IncompatibleTechniques: the request is unusable. EngineBusy: too many comparisons run.
        """
        checked = checked_request(request, self.service.pool.device)
        with self._lock:
            self._evict()
            known = self._jobs.get(again or "")
            if known is not None and not known.running and not known.complete and replace(known.request, output=None) == replace(checked, output=None):
                return known
            if len(self._jobs) >= self.capacity:
                raise EngineBusy(f"{len(self._jobs)} comparisons run already. Try again later.")
            name = secrets.token_urlsafe(12)
            folder = self._folder() / name
            folder.mkdir()
            job = self._jobs[name] = Job(name, replace(checked, output=folder), folder, used_s=time.monotonic())
            return job

    def stream(self, job: Job, stop: Stop) -> Iterator[CompareEvent]:
        """Run what is missing; the job's record is up to date when an event comes out. Closing the iterator stops the work.

        Raises:
            InvalidRequest: at once, when it runs already.
        """
        with self._lock:
            if job.running:
                raise InvalidRequest("This comparison runs already. Stop it first.")
            job.running, job.failed, job.stop = True, None, stop
        return self._events(job)

    def _events(self, job: Job) -> Iterator[CompareEvent]:
        try:
            for event in self.service.stream(job.request, job.stop):
                job.live.apply(event)
                job.failed = event.words if isinstance(event, Failed) else job.failed
                job.used_s = time.monotonic()
                yield event
        finally:
            job.running, job.live.running = False, None

    def find(self, job_id: str) -> Job:
        """The job of that id.

        Raises:
            InvalidRequest: there is none, or no longer.
        """
        with self._lock:
            job = self._jobs.get(job_id)
            if job is None:
                raise InvalidRequest(f"There is no comparison {str(job_id)[:40]!r}; it was never started, or has been forgotten. Start a new one.")
            job.used_s = time.monotonic()
            self._jobs.move_to_end(job_id)
            return job

    def _folder(self) -> Path:
        if self._root is None:
            self._root = Path(tempfile.mkdtemp(prefix="fusebox-compare-"))
            weakref.finalize(self, shutil.rmtree, self._root, ignore_errors=True)
        return self._root

    def _evict(self) -> None:
        idle = [job for job in self._jobs.values() if not job.running]
        stale = [job for job in idle if time.monotonic() - job.used_s > self.ttl_s]
        surplus = idle[: max(0, len(self._jobs) - self.capacity + 1)]
        for name in dict.fromkeys(job.id for job in (*stale, *surplus)):
            shutil.rmtree(self._jobs.pop(name).folder, ignore_errors=True)
