"""The device gate: one at a time, a bounded row, and giving up while waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from core.errors import EngineBusy
from core.progress import Stop
from engines.gate import DeviceGate


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def test_only_one_holds_the_device_at_a_time() -> None:
    gate, inside, most = DeviceGate(), [0], [0]

    def work() -> None:
        for _ in range(3):
            with gate.hold(Stop()) as held:
                assert held
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.002)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert gate.waiting == 0


def test_free_device_is_given_at_once() -> None:
    began = time.perf_counter()
    with DeviceGate().hold(Stop()) as held:
        assert held
    assert time.perf_counter() - began < 5


def test_stop_ends_the_waiting() -> None:
    gate, stop, results = DeviceGate(), Stop(), []

    def work() -> None:
        with gate.hold(stop) as held:
            results.append(held)

    with gate.hold(Stop()):
        thread = threading.Thread(target=work)
        thread.start()
        wait_until(lambda: gate.waiting == 1)
        stop.request()
        thread.join(60)
        assert results == [False]
        assert gate.waiting == 0


def test_one_who_gave_up_does_not_release_the_holder() -> None:
    gate, gone = DeviceGate(), Stop()
    gone.request()
    with gate.hold(Stop()):
        with gate.hold(gone) as held:
            assert not held
        late = Stop()
        threading.Timer(0.1, late.request).start()
        with gate.hold(late) as held:
            assert not held  # still taken by the first


def test_error_while_holding_frees_the_device() -> None:
    gate = DeviceGate()
    with pytest.raises(RuntimeError), gate.hold(Stop()):
        raise RuntimeError("broken")
    with gate.hold(Stop()) as held:
        assert held
    assert gate.waiting == 0


def test_full_row_is_refused_in_words_and_nobody_waits_longer_for_it() -> None:
    gate, stop = DeviceGate(waiting_limit=2), Stop()

    def wait() -> None:
        with gate.hold(stop):
            pass

    with gate.hold(Stop()):
        threads = [threading.Thread(target=wait) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: gate.waiting == 2)
        with pytest.raises(EngineBusy, match="2 requests wait already"), gate.hold(Stop()):
            pytest.fail("a third one was let into the row")
        assert gate.waiting == 2
    for thread in threads:
        thread.join(60)
    assert gate.waiting == 0
    with gate.hold(Stop()) as held:
        assert held


def test_holder_does_not_count_as_waiting() -> None:
    gate = DeviceGate(waiting_limit=1)
    with gate.hold(Stop()):
        assert gate.waiting == 0


def test_first_come_is_first_served() -> None:
    """Who lets go and comes back at once must not pass those who wait."""
    gate, order, threads = DeviceGate(), [], []

    def wait(name: int) -> None:
        with gate.hold(Stop()):
            order.append(name)

    with gate.hold(Stop()):
        for name in range(5):
            threads.append(threading.Thread(target=wait, args=(name,)))
            threads[-1].start()
            wait_until(lambda name=name: gate.waiting == name + 1)
    with gate.hold(Stop()):
        order.append("back")
    for thread in threads:
        thread.join(60)
    assert order == [0, 1, 2, 3, 4, "back"]


def test_one_who_gives_up_does_not_hold_up_those_behind() -> None:
    gate, gone, order = DeviceGate(), Stop(), []

    def wait(stop: Stop, name: str) -> None:
        with gate.hold(stop) as held:
            if held:
                order.append(name)

    with gate.hold(Stop()):
        threads = [threading.Thread(target=wait, args=row) for row in ((gone, "gone"), (Stop(), "next"))]
        for place, thread in enumerate(threads, 1):
            thread.start()
            wait_until(lambda place=place: gate.waiting == place)
        gone.request()
        threads[0].join(60)
    threads[1].join(60)
    assert order == ["next"]
