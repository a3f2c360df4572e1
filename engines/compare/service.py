"""Comparisons over a pool of engines: started, watched and stopped."""

from __future__ import annotations

from collections.abc import Iterator

from core.progress import Stop
from engines.compare.events import CompareEvent
from engines.compare.request import CompareRequest
from engines.gate import DeviceGate
from engines.pool import EnginePool


class CompareService:
    """Compares over a pool of engines; the gate lets one answer at a time onto the device, so that chats go on in between."""

    def __init__(self, pool: EnginePool, gate: DeviceGate | None = None) -> None:
        self.pool = pool
        self.gate = gate or DeviceGate()

    def stream(self, request: CompareRequest, stop: Stop | None = None) -> Iterator[CompareEvent]:
        """Events as they happen, `Finished` or `Failed` last. Closing the iterator stops the engine at its next token.

        Raises:
            InvalidRequest: at once, when the request or its folder is unusable.
        """
        raise NotImplementedError
