"""What went wrong, in words that a person reads; the log has the trace of what was not foreseen."""

from __future__ import annotations

import logging

from core.errors import FuseboxError

log = logging.getLogger(__name__)


def in_words(error: Exception) -> str:
    """An error as text: its own when it is meant for people."""
    if isinstance(error, FuseboxError):
        return str(error)
    if isinstance(error, MemoryError):
        return "Memory ran out while answering. Unload a model or shorten the prompt."
    log.error("the engine failed", exc_info=error)
    if isinstance(error, RuntimeError) and "memory" in str(error).lower():
        return "Memory ran out. Unload a model, or choose a smaller one."
    return f"The engine failed ({type(error).__name__}: {str(error)[:200]}). The next request starts afresh."
