"""Conversations by visitor, on the server: bounded in number and age, freed when the visitor leaves."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from core.progress import Stop
from engines.prompting import Message


@dataclass(frozen=True)
class Turn:
    """One question and one column's answer to it."""

    number: int
    question: str
    answer: str

    def messages(self) -> list[Message]:
        """As the two messages of a conversation."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


@dataclass
class Session:
    """One visitor's chats.

    turns: column -> the numbered turns it answered; a column that failed or was off has gaps. asked: questions so far.
    stop: ends the request that runs. record: the last comparison (request, answers, errors), for export.
    folder: where files for this visitor lie; gone with the session.
    """

    turns: dict[str, list[Turn]] = field(default_factory=dict)
    asked: int = 0
    stop: Stop | None = None
    record: Any = None
    folder: TemporaryDirectory[str] | None = None
    used_s: float = 0.0

    def history(self, column: str) -> list[Message]:
        """A column's conversation, a copy."""
        return [m for turn in self.turns.get(column, ()) for m in turn.messages()]

    def drop_from(self, number: int) -> None:
        """Forget every turn from question `number` on, in all columns."""
        for column, turns in self.turns.items():
            self.turns[column] = [t for t in turns if t.number < number]

    def last_turn(self) -> Turn | None:
        """The newest turn any column answered."""
        newest = [turns[-1] for turns in self.turns.values() if turns]
        return max(newest, key=lambda t: t.number, default=None)

    def snapshot(self) -> dict[str, list[Turn]]:
        """The turns as they are, to go back to."""
        return {column: list(turns) for column, turns in self.turns.items()}

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
            self._evict(now)
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
