"""One request at a time per device, first come first served, and a bounded row of those who wait."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import EngineBusy
from core.progress import Stop


class DeviceGate:
    """A lock with a row and a limit to it; whoever waits can give up. Who lets go and comes back goes to the end of the row."""

    def __init__(self, waiting_limit: int = 16) -> None:
        self._changed = threading.Condition()
        self._row: deque[object] = deque()
        self._taken = False
        self.waiting_limit = waiting_limit

    @property
    def waiting(self) -> int:
        """Requests in the row now."""
        return len(self._row)

    @contextmanager
    def hold(self, stop: Stop) -> Iterator[bool]:
        """Wait for the device; yields False when `stop` was requested while waiting.

        Raises:
            EngineBusy: the row is full.
        """
        held = self._wait(object(), stop)
        try:
            yield held
        finally:
            if held:
                with self._changed:
                    self._taken = False
                    self._changed.notify_all()

    def _wait(self, place: object, stop: Stop) -> bool:
        """Stand in the row until it is our turn or `stop` is requested."""
        with self._changed:
            if len(self._row) >= self.waiting_limit:
                raise EngineBusy(f"{len(self._row)} requests wait already. Try again in a minute.")
            self._row.append(place)
            try:
                while (self._taken or self._row[0] is not place) and not stop.requested:
                    self._changed.wait(0.05)  # nobody wakes us when stop is requested
                if stop.requested:
                    return False
                self._taken = True
                return True
            finally:
                self._row.remove(place)
                self._changed.notify_all()
