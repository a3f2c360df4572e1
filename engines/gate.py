"""One request at a time per device, and a bounded row of those who wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import EngineBusy
from core.progress import Stop


class DeviceGate:
    """A semaphore of one with a queue limit; whoever waits can give up."""

    def __init__(self, waiting_limit: int = 16) -> None:
        self._semaphore = threading.Semaphore(1)
        self._count = threading.Lock()
        self._waiting = 0
        self.waiting_limit = waiting_limit

    @property
    def waiting(self) -> int:
        """Requests in the row now."""
        return self._waiting

    @contextmanager
    def hold(self, stop: Stop) -> Iterator[bool]:
        """Wait for the device; yields False when `stop` was requested while waiting.

        Raises:
            EngineBusy: the row is full.
        """
        with self._count:
            if self._waiting >= self.waiting_limit:
                raise EngineBusy(f"{self._waiting} requests wait already. Try again in a minute.")
            self._waiting += 1
        held = False
        try:
            while not held and not stop.requested:
                held = self._semaphore.acquire(timeout=0.05)
        finally:
            with self._count:
                self._waiting -= 1
        try:
            yield held
        finally:
            if held:
                self._semaphore.release()
