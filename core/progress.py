"""How long work reports where it is and is asked to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[float, str], None]
"""Called with the fraction done in [0, 1] and one line of text."""


def silent(fraction: float, message: str) -> None:
    """The progress of somebody who does not watch."""


class Stop:
    """A flag one thread raises and another polls between steps; it never interrupts by itself."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def request(self) -> None:
        """Ask the work to end at its next step."""
        self._event.set()

    @property
    def requested(self) -> bool:
        """True once somebody asked."""
        return self._event.is_set()
