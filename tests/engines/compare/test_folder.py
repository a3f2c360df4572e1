"""A comparison on disk: it goes on after a kill, refuses what is not its own, and leaves other files alone."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import engines.compare.service as service_module
from core.errors import InvalidRequest
from core.progress import Stop
from engines.compare.events import CellStarted, Failed
from engines.compare.folder import RunFolder
from engines.compare.queries import Query
from engines.compare.record import load_record
from engines.compare.request import CompareRequest
from engines.compare.service import CompareService
from engines.metrics import METRICS
from engines.pool import EnginePool
from engines.sampling import Sampling
from tests.engines.compare.conftest import QUERIES, finish, only

ROOT = Path(__file__).resolve().parents[3]
Make = Callable[..., CompareRequest]
MEASURED_ANEW = {n for n, m in METRICS.items() if m["unit"] in ("s", "tok/s", "chars/s", "chars/s/GiB")} | {"peak_rss_bytes"}


def but_times(record: dict[str, Any]) -> dict[str, Any]:
    """The record without what is measured anew in each run."""

    def strip(metrics: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in metrics.items() if k not in MEASURED_ANEW}

    assert set(METRICS) >= MEASURED_ANEW and len(MEASURED_ANEW) == 9
    cells = [{**c, "metrics": strip(c["metrics"]), "token_gaps_s": len(c["token_gaps_s"])} for c in record["cells"]]
    return {**record, "cells": cells, "rows": [{**r, "metrics": strip(r["metrics"])} for r in record["rows"]]}


def test_killed_comparison_goes_on_and_equals_an_uninterrupted_one(compare: CompareService, model_folder: Path, tmp_path: Path) -> None:
    methods, queries = ("word_removal", "vattention", "native+int8"), tuple(Query(f"q{n}", "own", f"What is the {n}th small machine and what does it learn?") for n in range(1, 7))
    asked = CompareRequest(queries, methods, (str(model_folder),), 2, Sampling(60), "float32", output=tmp_path / "killed")
    (tmp_path / "queries.txt").write_text("\n".join(q.question for q in queries))
    words = ["compare", "--methods", *methods, "--models", str(model_folder), "--queries", str(tmp_path / "queries.txt"), "--repeats", "2",
             "--max-new-tokens", "60", "--dtype", "float32", "--output", str(asked.output)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([sys.executable, "cli.py", *words], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for_files(tmp_path / "killed" / "cells", 20, process)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed" / "cells").glob("*.json") if json.loads(p.read_text())["scored"]}
    assert 8 <= len(kept) < 48
    partial = load_record(tmp_path / "killed")
    assert partial["complete"] is False and {c["status"] for c in partial["cells"]} == {"done", "pending"}

    events = list(compare.stream(asked))
    resumed = dict(events[-1].record)
    whole = finish(compare, replace(asked, output=tmp_path / "whole"))
    assert resumed["complete"] and whole["complete"]
    assert but_times(resumed) == but_times(whole)
    assert len(only(events, CellStarted)) < 48  # what was there did not run again
    assert {name: (tmp_path / "killed" / "cells" / name).stat().st_mtime_ns for name in kept} == kept
    assert load_record(tmp_path / "killed") == resumed == json.loads((tmp_path / "killed" / "multi_query_results.json").read_text())


def wait_for_files(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while len(list(folder.glob("*.json"))) < count:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end, "it never got that far"
        time.sleep(0.005)


def test_stopped_comparison_goes_on_and_cancelled_cells_are_not_kept(compare: CompareService, make_compare: Make, tmp_path: Path) -> None:
    request, stop = make_compare("word_removal", tokens=30, output=tmp_path), Stop()
    stream = compare.stream(request, stop)
    for event in stream:
        if isinstance(event, CellStarted) and event.method == "word_removal":
            stop.request()
    first = load_record(tmp_path)
    assert first["complete"] is False and "pending" in {c["status"] for c in first["cells"]}
    assert finish(compare, request)["complete"] is True


def test_finished_comparison_runs_nothing_again(compare: CompareService, make_compare: Make, tmp_path: Path) -> None:
    request = make_compare("word_removal", output=tmp_path)
    first = finish(compare, request)
    events = list(compare.stream(request))
    assert only(events, CellStarted) == []
    assert events[-1].record == first


def test_answers_without_a_score_are_scored_and_not_asked_again(compare: CompareService, make_compare: Make, tmp_path: Path) -> None:
    request = make_compare("word_removal", output=tmp_path)
    first = finish(compare, request)
    for path in (tmp_path / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        path.write_text(json.dumps({**cell, "scored": False, "metrics": {**cell["metrics"], "rouge_l": None, "agreement_share": None, "agreement_tokens": None, "baseline_answer_bits_per_byte": None}}))
    events = list(compare.stream(request))
    assert only(events, CellStarted) == []
    assert events[-1].record == first


def test_failed_cells_are_tried_again(compare: CompareService, make_compare: Make, tmp_path: Path) -> None:
    request = make_compare("word_removal", output=tmp_path)
    first = finish(compare, request)
    path = tmp_path / "cells" / "0000-0000-0000-0001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "failed", "error": "a bad day"}))
    assert load_record(tmp_path)["cells"][1]["status"] == "failed"
    events = list(compare.stream(request))
    assert [(e.method, e.query) for e in only(events, CellStarted)] == [("word_removal", QUERIES[0].id)]
    assert but_times(dict(events[-1].record)) == but_times(first)


@pytest.mark.parametrize("scrap", ["", "{", "[]", '{"status": "done"}'], ids=["empty", "cut", "list", "short"])
def test_broken_cell_runs_again(compare: CompareService, make_compare: Make, tmp_path: Path, scrap: str) -> None:
    request = make_compare("word_removal", output=tmp_path)
    first = finish(compare, request)
    (tmp_path / "cells" / "0000-0001-0000-0000.json").write_text(scrap)
    (tmp_path / "cells" / ".0000.json.half").write_text("{")
    events = list(compare.stream(request))
    assert [(e.method, e.query) for e in only(events, CellStarted)] == [("baseline", QUERIES[1].id)]
    assert but_times(dict(events[-1].record)) == but_times(first)
    assert not list((tmp_path / "cells").glob(".*"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": ("int8",)}, "methods is .*word_removal.* there, .*int8.* here"),
        ({"sampling": Sampling(9, ignore_eos=True)}, "max_new_tokens is 8 there, 9 here"),
        ({"sampling": Sampling(8, seed=1, ignore_eos=True)}, "seed is 0 there, 1 here"),
        ({"repeats": 2}, "repeats is 1 there, 2 here"),
        ({"queries": QUERIES[1:]}, "queries is"),
    ],
)
def test_other_request_in_the_folder_is_refused(compare: CompareService, make_compare: Make, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    request = make_compare("word_removal", output=tmp_path)
    finish(compare, request)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    with pytest.raises(InvalidRequest, match=f"holds another comparison: {says}.*start afresh"):
        compare.stream(replace(request, **change))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")} == before
    assert finish(compare, replace(request, **change, fresh=True))["complete"] is True


def test_cells_of_other_code_or_another_machine_are_not_mixed_in(compare: CompareService, make_compare: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_compare(output=tmp_path)
    finish(compare, request)
    here = service_module.provenance()
    monkeypatch.setattr(service_module, "provenance", lambda: {**here, "cpu": "Abacus 3000"})
    with pytest.raises(InvalidRequest, match="cpu was .*, now Abacus 3000"):
        compare.stream(request)


def test_model_that_changed_is_refused(compare: CompareService, make_compare: Make, tmp_path: Path) -> None:
    request = make_compare("word_removal", output=tmp_path)
    finish(compare, request)
    state = tmp_path / "comparison.json"
    state.write_text(state.read_text().replace(load_record(tmp_path)["models"][0]["revision"], "0123456789abcdef"))
    (tmp_path / "cells" / "0000-0000-0000-0000.json").unlink()
    last = list(compare.stream(request))[-1]
    assert isinstance(last, Failed) and "revision 0123456789abcdef" in last.words


def test_number_format_chosen_by_timing_is_kept(make_compare: Make, tmp_path: Path) -> None:
    """Timed again it could come out otherwise, and texts of two formats would stand in one row."""
    request = make_compare("word_removal", dtype="auto", output=tmp_path)
    chosen = finish(CompareService(EnginePool()), request)["models"][0]["dtype"]
    other = {"float32": "bfloat16", "bfloat16": "float32"}[chosen]
    state = json.loads((tmp_path / "comparison.json").read_text())
    state["models"]["0"]["dtype"] = other
    (tmp_path / "comparison.json").write_text(json.dumps(state))
    for path in (tmp_path / "cells").glob("*.json"):
        path.unlink()
    record = finish(CompareService(EnginePool()), request)
    assert {c["metrics"]["dtype"] for c in record["cells"]} == {other}
    assert record["models"][0]["dtype"] == other


def test_two_runs_in_one_folder_are_refused(compare: CompareService, make_compare: Make, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(InvalidRequest, match="Another comparison is writing"):
        compare.stream(make_compare(output=tmp_path))
    folder.close()
    assert finish(compare, make_compare(output=tmp_path))["complete"] is True


def test_fresh_leaves_other_files_alone(compare: CompareService, make_compare: Make, tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    for name in ("notes.txt", "cells/mine.txt"):
        (tmp_path / name).write_text("mine")
    finish(compare, make_compare("word_removal", output=tmp_path))
    finish(compare, make_compare(output=tmp_path, fresh=True))
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "cells" / "mine.txt").read_text() == "mine"
    assert len(list((tmp_path / "cells").glob("*.json"))) == 2


def test_folder_that_cannot_be_written_is_refused(compare: CompareService, make_compare: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="cannot be written to"):
        compare.stream(make_compare(output=tmp_path / "file" / "out"))


def test_tables_hold_every_cell_and_row_and_no_formula(compare: CompareService, make_compare: Make, tmp_path: Path) -> None:
    evil = Query("=1+1", "@kind", "=HYPERLINK(\"http://example.org\")")
    record = finish(compare, make_compare("word_removal", queries=(evil, QUERIES[0]), output=tmp_path))
    cells = list(csv.DictReader(io.StringIO((tmp_path / "multi_query_results.csv").read_text())))
    assert [(c["method"], c["status"], c["text"].lstrip("'")) for c in cells] == [(c["method"], "done", c["text"].lstrip("'")) for c in record["cells"]]
    assert {c["query"] for c in cells} == {"'=1+1", QUERIES[0].id} and cells[0]["question"].startswith("'=HYPERLINK") and cells[0]["kind"] == "'@kind"
    assert [float(c["ttft_s"]) for c in cells] == [c["metrics"]["ttft_s"] for c in record["cells"]]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "multi_query_rows.csv").read_text())))
    assert [float(r["decode_tok_s_median"]) for r in rows] == [r["metrics"]["decode_tok_s"]["median"] for r in record["rows"]]
    assert rows[0]["keyword_recall_n"] == "1"


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "no JSON"), ("{", "no JSON"), ("[]", "no comparison of format 1"), ('{"format": 2}', "no comparison of format 1"), ("\x00", "no JSON")],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "multi_query_results.json").write_text(text)
    for place in (tmp_path, tmp_path / "multi_query_results.json"):
        with pytest.raises(InvalidRequest, match=says):
            load_record(place)


def test_folder_without_a_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="There is no comparison"):
        load_record(tmp_path)
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_record(tmp_path)
