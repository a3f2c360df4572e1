"""Sessions: bounded in number and age, and whatever runs for a visitor who is gone is halted."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest

import engines.sessions as sessions_module
from core.progress import Stop
from engines.sessions import Session, SessionRegistry, Turn


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sessions_module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def running(session: Session) -> Stop:
    session.stop = Stop()
    return session.stop


def test_visitor_gets_the_same_session_again_and_another_one_another() -> None:
    registry = SessionRegistry()
    session = registry.get("ann")
    session.turns["baseline"] = [Turn(1, "hello", "hi")]
    assert registry.get("ann") is session
    assert registry.get("bob") is not session
    assert registry.get("bob").turns == {}


def test_too_many_sessions_drop_the_least_recently_used_and_halt_it() -> None:
    registry = SessionRegistry(capacity=2)
    ann, bob = registry.get("ann"), registry.get("bob")
    stops = {name: running(s) for name, s in (("ann", ann), ("bob", bob))}
    registry.get("ann")
    registry.get("cid")
    assert len(registry) == 2
    assert stops["bob"].requested
    assert not stops["ann"].requested
    assert registry.get("ann") is ann
    assert registry.get("bob") is not bob


def test_unused_session_goes_at_the_next_look_and_its_run_is_halted(clock: Clock) -> None:
    registry = SessionRegistry(ttl_s=60)
    stop = running(registry.get("ann"))
    clock.now += 61
    registry.get("bob")
    assert len(registry) == 1
    assert stop.requested


def test_session_in_use_lives_on(clock: Clock) -> None:
    registry = SessionRegistry(ttl_s=60)
    session = registry.get("ann")
    for _ in range(5):
        clock.now += 50
        assert registry.get("ann") is session
    assert len(registry) == 1


def test_visitor_who_comes_back_too_late_starts_afresh(clock: Clock) -> None:
    registry = SessionRegistry(ttl_s=60)
    session = registry.get("ann")
    stop = running(session)
    clock.now += 61
    assert registry.get("ann") is not session
    assert stop.requested


def test_unload_forgets_the_visitor_and_halts_the_run() -> None:
    registry = SessionRegistry()
    session = registry.get("ann")
    stop, other = running(session), running(registry.get("bob"))
    registry.unload("ann")
    assert stop.requested
    assert not other.requested
    assert len(registry) == 1
    assert registry.get("ann") is not session


def test_unload_of_a_stranger_or_of_an_idle_session_does_nothing() -> None:
    registry = SessionRegistry()
    registry.get("ann")
    registry.unload("stranger")
    registry.unload("ann")
    registry.unload("ann")
    assert len(registry) == 0


def test_many_threads_never_exceed_the_capacity() -> None:
    registry = SessionRegistry(capacity=5)
    too_many = []

    def work(name: int) -> None:
        for turn in range(50):
            registry.get(f"{name}-{turn % 7}")
            if len(registry) > 6:  # one may just be coming in
                too_many.append(len(registry))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert too_many == []
    assert len(registry) == 5


def told() -> Session:
    """Three questions; word_removal failed the second, bnb_int8 answered the first only."""
    return Session(turns={
        "baseline": [Turn(1, "one?", "a1"), Turn(2, "two?", "a2"), Turn(3, "three?", "a3")],
        "word_removal": [Turn(1, "one?", "b1"), Turn(3, "three?", "b3")],
        "bnb_int8": [Turn(1, "one?", "c1")],
    }, asked=3)


def test_history_is_the_column_s_own_conversation() -> None:
    assert told().history("word_removal") == [
        {"role": "user", "content": "one?"}, {"role": "assistant", "content": "b1"},
        {"role": "user", "content": "three?"}, {"role": "assistant", "content": "b3"},
    ]
    assert told().history("stranger") == []


def test_history_is_a_copy() -> None:
    session = told()
    session.history("baseline").clear()
    session.history("baseline")[0]["content"] = "changed"
    assert session.history("baseline")[0]["content"] == "one?"


def test_dropping_a_question_takes_it_and_all_later_ones_from_every_column() -> None:
    session = told()
    session.drop_from(2)
    assert {c: [t.number for t in turns] for c, turns in session.turns.items()} == {"baseline": [1], "word_removal": [1], "bnb_int8": [1]}


def test_last_turn_is_the_newest_any_column_answered() -> None:
    session = told()
    last = session.last_turn()
    assert last is not None and (last.number, last.question) == (3, "three?")
    assert Session().last_turn() is None
    session.drop_from(1)
    assert session.last_turn() is None


def test_snapshot_is_not_touched_by_what_follows() -> None:
    session = told()
    before = session.snapshot()
    session.turns["baseline"].append(Turn(4, "four?", "a4"))
    session.drop_from(2)
    assert before == told().turns


def test_new_request_ends_the_one_before_it() -> None:
    session = Session()
    first = session.begin()
    second = session.begin()
    assert first.requested
    assert not second.requested
    assert session.stop is second


def test_abandoned_request_is_ended_and_forgotten() -> None:
    session = Session()
    stop = session.begin()
    session.abandon()
    assert stop.requested
    assert session.stop is None
    session.halt()  # nothing runs: nothing happens


def test_files_of_a_visitor_go_with_the_session() -> None:
    registry = SessionRegistry()
    session = registry.get("ann")
    session.folder = TemporaryDirectory()
    folder = Path(session.folder.name)
    assert folder.is_dir()
    registry.unload("ann")
    del session
    gc.collect()
    assert not folder.exists()
