"""Whether the running forward call reads the prompt or decodes: techniques that treat the two apart ask here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Phase(threading.local):
    prompt: bool | None = None


_phase = _Phase()


@contextmanager
def reading_prompt(prompt: bool) -> Iterator[None]:
    """Forward calls of this thread inside the block read the prompt, or decode, however many tokens they take."""
    before = _phase.prompt
    _phase.prompt = prompt
    try:
        yield
    finally:
        _phase.prompt = before


def is_prompt(tokens: int) -> bool:
    """True when the running call reads the prompt; calls from outside `core.decoding` do when they take more than one token."""
    return tokens > 1 if _phase.prompt is None else _phase.prompt
