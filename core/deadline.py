"""A time limit for code that cannot be asked to stop, such as a chat template that came with a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from core.errors import InvalidRequest


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """End Python code of this thread that runs longer than `seconds`.

    Raises:
        InvalidRequest: the time is up; says `what` was too slow.
    """
    ends = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if time.monotonic() > ends:
            raise InvalidRequest(f"{what} did not finish in {seconds:g} s.")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
