"""A thread for one rival alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class OwnThread:
    """Runs calls in one thread that nobody else uses, and waits for each.

    OpenVINO configures the matrix registers (AMX) of the thread that calls it once and counts on that later; torch's products and ours
    configure the same ones, and its next prompt would end in an illegal instruction.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rival")

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), in the thread."""
        return self._pool.submit(function, *args).result()


def here(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), in the caller's thread: for everything else. llama.cpp's OpenMP would make threads of its own, more than there are CPUs."""
    return function(*args)
