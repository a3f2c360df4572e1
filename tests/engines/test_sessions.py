"""Sessions: bounded in number and age, and whatever runs for a visitor who is gone is halted."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

import engines.sessions as sessions_module
from core.progress import Stop
from engines.sessions import Session, SessionRegistry


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
    session.histories["baseline"] = [{"role": "user", "content": "hello"}]
    assert registry.get("ann") is session
    assert registry.get("bob") is not session
    assert registry.get("bob").histories == {}


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
