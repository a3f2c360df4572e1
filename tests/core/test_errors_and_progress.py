"""The tree of errors is the one its docstring draws; Stop is a flag."""

from __future__ import annotations

import inspect
import re
import threading

import pytest

from core import errors
from core.errors import FuseboxError
from core.progress import Stop, silent

CLASSES = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}


def drawn_tree() -> dict[str, str]:
    """Child -> parent as the module's docstring draws it."""
    parents: dict[str, str] = {}
    above = {0: "FuseboxError"}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"( [| ]*)\+-- (\w+)", line):
            depth = 1 if len(found[1]) == 1 else 2
            parents[found[2]] = above[depth - 1]
            above[depth] = found[2]
    return parents


def test_docstring_draws_the_tree_that_is_there() -> None:
    assert drawn_tree() == {name: kind.__bases__[0].__name__ for name, kind in CLASSES.items() if kind is not FuseboxError}
    assert len(CLASSES) > 10


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
def test_errors_show_their_message_and_are_no_builtin_errors(kind: type[FuseboxError]) -> None:
    assert str(kind("what, which, what to do")) == "what, which, what to do"
    assert issubclass(kind, FuseboxError) and not issubclass(kind, (OSError, ValueError, RuntimeError, MemoryError))


def test_stop_is_seen_by_other_threads_and_stays() -> None:
    stop = Stop()
    assert not stop.requested
    thread = threading.Thread(target=stop.request)
    thread.start()
    thread.join()
    assert stop.requested
    stop.request()
    assert stop.requested


def test_silent_progress_takes_what_a_progress_takes() -> None:
    assert silent(0.5, "half") is None
