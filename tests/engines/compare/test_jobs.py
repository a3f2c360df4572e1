"""Comparisons by id: found again, gone on with after a stop, forgotten, and their record while it fills."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from core.errors import EngineBusy, InvalidRequest
from core.progress import Stop
from engines.compare.events import CellDone, Finished, Started
from engines.compare.jobs import CompareJobs, Job
from engines.compare.live import LiveRecord
from engines.compare.request import CompareRequest
from engines.compare.service import CompareService
from engines.pool import EnginePool
from tests.engines.compare.conftest import QUERIES, finish, only

Make = Callable[..., CompareRequest]


@pytest.fixture
def jobs(compare: CompareService) -> CompareJobs:
    return CompareJobs(compare)


def run(jobs: CompareJobs, job: Job, cells: int | None = None) -> None:
    """To the end, or until so many cells are done."""
    stop = Stop()
    done = 0
    for event in jobs.stream(job, stop):
        done += isinstance(event, CellDone)
        if cells is not None and done >= cells:
            stop.request()


def test_the_live_record_becomes_the_finished_one_cell_by_cell(compare: CompareService, make_compare: Make) -> None:
    live, seen = LiveRecord(), []
    for event in compare.stream(make_compare("int8")):
        live.apply(event)
        seen.append(sum(c["status"] == "done" for c in live.record["cells"]))
        if isinstance(event, CellDone):
            rows = live.record["rows"]
            assert sum(r["done"] for r in rows) == seen[-1]
            before = live.record
        if isinstance(event, Started):
            assert seen == [0] and all(r["done"] == 0 for r in live.record["rows"])
        if isinstance(event, Finished):
            assert before["rows"] == event.record["rows"] and before["cells"] == event.record["cells"]
    assert set(seen) == {0, 1, 2, 3, 4} and seen == sorted(seen)
    assert live.progress.fraction == 1.0


def test_a_job_is_found_by_its_id_and_holds_the_record(jobs: CompareJobs, make_compare: Make) -> None:
    job = jobs.open(make_compare("int8"))
    run(jobs, job)
    found = jobs.find(job.id)
    assert found is job and found.complete and not found.running
    assert len(found.live.record["cells"]) == 4
    assert (found.folder / "multi_query_results.json").is_file()
    with pytest.raises(InvalidRequest, match="no comparison 'nonsense'"):
        jobs.find("nonsense")


def test_a_stopped_job_goes_on_when_the_same_is_asked(jobs: CompareJobs, make_compare: Make, compare: CompareService) -> None:
    request = make_compare("int8", repeats=2)
    job = jobs.open(request)
    run(jobs, job, cells=3)
    kept = [c for c in job.live.record["cells"] if c["status"] == "done"]
    assert 0 < len(kept) < 8 and not job.complete
    again = jobs.open(request, job.id)
    assert again is job
    events = list(jobs.stream(again, Stop()))
    first = only(events, Started)[0].record
    assert [c for c in first["cells"] if c["status"] == "done"] == kept
    assert again.complete
    whole = finish(compare, request)
    assert [c["text"] for c in again.live.record["cells"]] == [c["text"] for c in whole["cells"]]


def test_a_finished_or_another_request_is_a_new_job(jobs: CompareJobs, make_compare: Make) -> None:
    job = jobs.open(make_compare("int8"))
    run(jobs, job, cells=1)
    assert jobs.open(make_compare("int8", seed=1), job.id) is not job
    assert jobs.open(make_compare("int8", queries=QUERIES[1:]), job.id) is not job
    run(jobs, job)
    assert jobs.open(make_compare("int8"), job.id) is not job


def test_a_running_job_is_not_started_twice(jobs: CompareJobs, make_compare: Make) -> None:
    job = jobs.open(make_compare())
    events = jobs.stream(job, Stop())
    next(events)
    with pytest.raises(InvalidRequest, match="runs already"):
        jobs.stream(job, Stop())
    events.close()  # type: ignore[attr-defined]
    assert not job.running


def test_old_jobs_make_room_and_their_folders_go(make_compare: Make) -> None:
    jobs = CompareJobs(CompareService(EnginePool()), capacity=2)
    first, second = jobs.open(make_compare()), jobs.open(make_compare(seed=1))
    third = jobs.open(make_compare(seed=2))
    assert not first.folder.exists() and second.folder.exists() and third.folder.exists()
    with pytest.raises(InvalidRequest):
        jobs.find(first.id)
    second.running = third.running = True
    with pytest.raises(EngineBusy, match="2 comparisons run already"):
        jobs.open(make_compare(seed=3))
    assert second.folder.exists()


def test_unused_jobs_are_forgotten_after_their_time(make_compare: Make) -> None:
    jobs = CompareJobs(CompareService(EnginePool()), ttl_s=-1.0)
    job = jobs.open(make_compare())
    jobs.open(make_compare(seed=1))
    with pytest.raises(InvalidRequest):
        jobs.find(job.id)
