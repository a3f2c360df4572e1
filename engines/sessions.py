"""Conversations by visitor, on the server: bounded in number and age, freed when the visitor leaves."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from core.progress import Stop
from engines.prompting import Message


@dataclass
class Session:
    """One visitor's chats.

    histories: column -> its conversation. turns: questions asked so far. stop: ends the request that runs.
    record: the last comparison (request, answers, errors), for export.
    """

    histories: dict[str, list[Message]] = field(default_factory=dict)
    turns: int = 0
    stop: Stop | None = None
    record: Any = None
    used_s: float = 0.0

    def begin(self) -> Stop:
        """A fresh stop flag for a new request; one that still runs for this visitor is asked to end."""
        self.halt()
        self.stop = Stop()
        return self.stop

    def halt(self) -> None:
        """Ask the running request, if any, to end at its next token."""
        if self.stop is not None:
            self.stop.request()

    def abandon(self) -> None:
        """End the running request and forget it: what it still brings is not added to the conversation."""
        self.halt()
        self.stop = None


class SessionRegistry:
    """Sessions by id. The oldest go first when there are too many; those not used for `ttl_s` go at the next look."""

    def __init__(self, capacity: int = 200, ttl_s: float = 3600.0) -> None:
        self.capacity, self.ttl_s = capacity, ttl_s
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, session_id: str) -> Session:
        """The visitor's session, made now if there is none."""
        now = time.monotonic()
        with self._lock:
            session = self._sessions.setdefault(session_id, Session())
            session.used_s = now
            self._sessions.move_to_end(session_id)
            self._evict(now)
            return session

    def unload(self, session_id: str) -> None:
        """Forget a visitor who left, and stop what runs for them."""
        with self._lock:
            session = self._sessions.pop(session_id, None)
        if session is not None:
            session.halt()

    def __len__(self) -> int:
        return len(self._sessions)

    def _evict(self, now: float) -> None:
        stale = [key for key, s in self._sessions.items() if now - s.used_s > self.ttl_s]
        surplus = list(self._sessions)[: max(0, len(self._sessions) - self.capacity)]
        for key in dict.fromkeys([*stale, *surplus]):
            self._sessions.pop(key).halt()
