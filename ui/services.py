"""What all tabs and clients of one running app share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from core.loading import embedded_models
from core.progress import Stop
from engines.chat import ChatService
from engines.compare.jobs import CompareJobs
from engines.compare.service import CompareService
from engines.gate import DeviceGate
from engines.pool import EnginePool
from engines.sessions import SessionRegistry


def on_space() -> bool:
    """True when this runs as a Hugging Face Space: visitors are strangers, so local folders are closed."""
    return "SPACE_ID" in os.environ


@dataclass
class Services:
    """Engines and visitors. One instance an app."""

    pool: EnginePool = field(default_factory=lambda: EnginePool(allow_local=not on_space()))
    gate: DeviceGate = field(default_factory=DeviceGate)
    sessions: SessionRegistry = field(default_factory=SessionRegistry)
    chat: ChatService = field(init=False)
    jobs: CompareJobs = field(init=False)
    _stops: dict[str, set[Stop]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chat = ChatService(self.pool, self.gate)
        self.jobs = CompareJobs(CompareService(self.pool, self.gate))

    @contextmanager
    def visitor_stop(self, visitor: str) -> Iterator[Stop]:
        """A stop flag for something that runs for a visitor, raised when they leave."""
        stop = Stop()
        self._stops.setdefault(visitor, set()).add(stop)
        try:
            yield stop
        finally:
            stops = self._stops.get(visitor, set())
            stops.discard(stop)
            if not stops:
                self._stops.pop(visitor, None)

    def leave(self, visitor: str) -> None:
        """A visitor's tab was closed or a client went away: stop what runs for them and forget them."""
        for stop in list(self._stops.get(visitor, ())):
            stop.request()
        self.sessions.unload(visitor)

    def models(self) -> list[str]:
        """Models to offer; any hub id or folder may be typed as well."""
        return list(embedded_models())
