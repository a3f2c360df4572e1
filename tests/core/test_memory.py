"""Memory figures: measured on this process, limits of the container respected, None where the system does not tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from core import memory

MIB = 1 << 20
BIG = 64 * MIB
SLACK = 16 * MIB  # what else the process may take or give back meanwhile


def test_resident_bytes_grow_and_shrink_with_what_is_held() -> None:
    before = memory.resident_bytes()
    block = torch.ones(BIG // 4)
    assert BIG - SLACK < memory.resident_bytes() - before < BIG + SLACK
    del block
    assert abs(memory.resident_bytes() - before) < SLACK


def test_peak_counts_from_the_reset_and_keeps_what_was_freed() -> None:
    if not memory.reset_peak():
        pytest.skip("NOT RUN: this system does not let a process reset its peak")
    start = memory.peak_resident_bytes()
    assert start is not None and abs(start - memory.resident_bytes()) < SLACK
    block = torch.ones(BIG // 4)
    del block
    peak = memory.peak_resident_bytes()
    assert peak is not None and BIG - SLACK < peak - start < BIG + SLACK
    assert memory.resident_bytes() < peak - BIG + SLACK
    assert memory.reset_peak()
    assert memory.peak_resident_bytes() < peak - BIG + SLACK  # type: ignore[operator]


def test_reset_that_is_not_allowed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "no" / "such" / "file")
    assert memory.reset_peak() is False


@pytest.mark.parametrize(("status", "expected"), [("VmPeak:\t 9 kB\nVmHWM:\t  1234 kB\nVmRSS:\t 5 kB\n", 1234 * 1024), ("VmRSS:\t 5 kB\n", None), (None, None)])
def test_peak_is_read_in_kib_or_not_measured(status: str | None, expected: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if status is not None:
        (tmp_path / "status").write_text(status)
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert memory.peak_resident_bytes() == expected


GIB = 1 << 30
V2 = "/sys/fs/cgroup/"
V1 = "/sys/fs/cgroup/memory/"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """`machine(available, {path: text})`: the memory the system reports and the files of its container."""

    def set_up(available: int, files: dict[str, str], statistics: bool = True) -> None:
        if statistics:
            files = {V2 + "memory.stat": "anon 7\ninactive_file 0\n", V1 + "memory.stat": "cache 7\ntotal_inactive_file 0\n", **files}
        for name, text in files.items():
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=available, total=2 * available))
        monkeypatch.setattr(memory, "Path", lambda name: tmp_path / str(name).lstrip("/"))

    return set_up


@pytest.mark.parametrize(("files", "expected"), [
    ({}, 16 * GIB),
    ({V2 + "memory.max": "max\n", V2 + "memory.current": f"{GIB}\n"}, 16 * GIB),
    ({V2 + "memory.max": f"{4 * GIB}\n", V2 + "memory.current": f"{GIB}\n"}, 3 * GIB),
    ({V2 + "memory.max": f"{64 * GIB}\n", V2 + "memory.current": f"{GIB}\n"}, 16 * GIB),
    ({V1 + "memory.limit_in_bytes": f"{4 * GIB}", V1 + "memory.usage_in_bytes": f"{3 * GIB}"}, GIB),
    ({V1 + "memory.limit_in_bytes": "9223372036854771712", V1 + "memory.usage_in_bytes": f"{3 * GIB}"}, 16 * GIB),
    ({V2 + "memory.max": f"{GIB}", V2 + "memory.current": f"{2 * GIB}"}, 0),
    ({V2 + "memory.max": "nonsense", V2 + "memory.current": "1"}, 16 * GIB),
    ({V2 + "memory.max": f"{GIB}"}, 16 * GIB),
], ids=["no container", "no limit", "v2", "v2 above the machine", "v1", "v1 no limit", "over the limit", "unreadable", "half there"])
def test_available_is_the_smaller_of_machine_and_container(files: dict[str, str], expected: int, machine: Callable[..., None]) -> None:
    machine(16 * GIB, files)
    assert memory.available_bytes() == expected


@pytest.mark.parametrize("files", [
    {V2 + "memory.max": f"{4 * GIB}\n", V2 + "memory.current": f"{GIB}\n"},
    {V1 + "memory.limit_in_bytes": f"{4 * GIB}", V1 + "memory.usage_in_bytes": f"{GIB}"},
], ids=["v2", "v1"])
def test_limit_counts_where_there_are_no_statistics(files: dict[str, str], machine: Callable[..., None]) -> None:
    machine(16 * GIB, files, statistics=False)
    assert memory.available_bytes() == 3 * GIB and memory.total_bytes() == 4 * GIB


@pytest.mark.parametrize(("files", "expected"), [
    ({}, 32 * GIB), ({V2 + "memory.max": f"{4 * GIB}", V2 + "memory.current": f"{3 * GIB}"}, 4 * GIB),
    ({V2 + "memory.max": "max", V2 + "memory.current": f"{3 * GIB}"}, 32 * GIB), ({V2 + "memory.max": f"{99 * GIB}", V2 + "memory.current": "0"}, 32 * GIB),
], ids=["no container", "limit", "no limit", "limit above the machine"])
def test_total_is_the_smaller_of_machine_and_container(files: dict[str, str], expected: int, machine: Callable[..., None]) -> None:
    machine(16 * GIB, files)
    assert memory.total_bytes() == expected


def test_page_cache_of_the_container_can_be_had(machine: Callable[..., None]) -> None:
    machine(16 * GIB, {V2 + "memory.max": f"{8 * GIB}", V2 + "memory.current": f"{7 * GIB}", V2 + "memory.stat": f"anon {GIB}\ninactive_file {5 * GIB}\nactive_file {GIB}\n"})
    assert memory.available_bytes() == 6 * GIB


def test_available_is_what_this_machine_could_give() -> None:
    import psutil

    assert 0 < memory.available_bytes() <= psutil.virtual_memory().total
