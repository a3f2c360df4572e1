"""A comparison from request to record: order, statuses, quality, failures, stopping, times."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import engines.quality as quality_module
from core.bundle import Bundle
from core.errors import UnsupportedModel
from core.evaluation import agreement, score_continuation
from core.progress import Stop
from engines.compare.comparison import Comparison
from engines.compare.events import CellDone, CellStarted, Finished, Progress
from engines.compare.pace import Pace
from engines.compare.request import CompareRequest, checked_request
from engines.compare.service import CompareService
from engines.engine import Engine
from engines.export import to_json
from engines.gate import DeviceGate
from engines.metrics import METRICS, percentile
from engines.pool import EnginePool
from engines.prompting import build_prompt
from engines.text_quality import rouge_l
from optim.word_removal.technique import WordRemoval
from tests.engines.compare.conftest import QUERIES, cells_of, finish, only

Make = Callable[..., CompareRequest]


def test_every_cell_is_answered_and_scored(compare: CompareService, make_compare: Make) -> None:
    record = finish(compare, make_compare("word_removal", "int8", repeats=2))
    assert record["complete"] is True
    assert [m["method"] for m in record["methods"]] == ["baseline", "word_removal", "int8"]
    assert [(c["method"], c["query"], c["repeat"]) for c in record["cells"]] == [
        (m, q.id, r) for r in range(2) for q in QUERIES[:2] for m in ("baseline", "word_removal", "int8")
    ]
    for cell in record["cells"]:
        assert cell["status"] == "done" and cell["error"] is None and cell["text"]
        assert cell["metrics"]["output_tokens"] == 8 and len(cell["token_gaps_s"]) == 7
        assert cell["metrics"]["ttft_s"] > 0 and cell["metrics"]["agreement_share"] is not None
    assert record["settings"]["methods"] == ["baseline", "word_removal", "int8"]
    assert record["settings"]["max_new_tokens"] == 8 and record["settings"]["device"] == "cpu"
    assert set(record["definitions"]) == set(METRICS)


def test_record_is_strict_json_and_holds_no_path_of_the_machine(compare: CompareService, make_compare: Make) -> None:
    request = make_compare("word_removal")
    text = to_json(finish(compare, request))
    assert json.loads(text)["models"][0]["model_id"] == "llama"
    assert "NaN" not in text and request.models[0] not in text


def test_methods_run_forwards_and_backwards_in_turns(compare: CompareService, make_compare: Make) -> None:
    events = list(compare.stream(make_compare("word_removal", "int8", repeats=2)))
    started = [(e.repeat, e.query, e.method) for e in only(events, CellStarted)]
    names = ["baseline", "word_removal", "int8"]
    assert [m for _, _, m in started] == names + names[::-1] + names[::-1] + names


def test_quality_is_against_the_baselines_answer(compare: CompareService, make_compare: Make) -> None:
    request = make_compare("word_removal", tokens=12)
    record = finish(compare, request)
    engine = compare.pool.get(request.models[0], (WordRemoval(),), dtype="float32")
    base = compare.pool.get(request.models[0], dtype="float32")
    for query in QUERIES[:2]:
        said = {c["method"]: c for c in record["cells"] if c["query"] == query.id}
        tokens = {}
        for method, on in (("baseline", base), ("word_removal", engine)):
            tokens[method] = on.answer([{"role": "user", "content": query.question}], request.sampling, Stop(), lambda _: None).token_ids
        prompt = build_prompt(engine.bundle, [{"role": "user", "content": query.question}]).ids
        measured = said["word_removal"]["metrics"]
        assert measured["baseline_answer_bits_per_byte"] == pytest.approx(score_continuation(engine.bundle, prompt, tokens["baseline"]).bits_per_byte)
        assert (measured["agreement_tokens"], measured["agreement_share"]) == agreement(tokens["baseline"], tokens["word_removal"])
        assert measured["rouge_l"] == rouge_l(said["word_removal"]["text"], said["baseline"]["text"])
        assert said["baseline"]["metrics"]["agreement_share"] == 1
    assert cells_of(record, "word_removal")[0]["metrics"]["agreement_share"] < 1  # else the above compares nothing
    assert [c["metrics"]["keyword_recall"] is None for c in cells_of(record, "baseline")] == [False, True]


def test_repeats_and_second_runs_give_the_same_texts(compare: CompareService, make_compare: Make) -> None:
    request = make_compare("word_removal", temperature=1.0, seed=5, repeats=2)
    first, second = finish(compare, request), finish(compare, request)
    assert [c["text"] for c in first["cells"]] == [c["text"] for c in second["cells"]]
    for method in ("baseline", "word_removal"):
        by_repeat = [[c["text"] for c in cells_of(first, method) if c["repeat"] == r] for r in range(2)]
        assert by_repeat[0] == by_repeat[1]
    other = finish(compare, make_compare("word_removal", temperature=1.0, seed=6, repeats=2))
    assert [c["text"] for c in other["cells"]] != [c["text"] for c in first["cells"]]


def test_rows_are_the_medians_of_the_cells(compare: CompareService, make_compare: Make) -> None:
    record = finish(compare, make_compare("word_removal", "int8", repeats=2, queries=QUERIES))
    assert [(r["method"], r["label"]) for r in record["rows"]] == [("baseline", "reference"), ("word_removal", "executed"), ("int8", "stored")]
    for row in record["rows"]:
        cells = cells_of(record, row["method"])
        assert row["done"] == len(cells) == 6
        seen = set()
        for name in METRICS:
            values = [c["metrics"][name] for c in cells if type(c["metrics"][name]) in (int, float)]
            if values:
                seen.add(name)
                assert row["metrics"][name] == {"median": statistics.median(values), "p10": percentile(values, 0.1), "p90": percentile(values, 0.9), "n": len(values)}
        assert set(row["metrics"]) == seen
    assert record["rows"][0]["metrics"]["keyword_recall"]["n"] == 4  # one query has no keywords


def test_times_agree_with_a_stopwatch_around_the_engine(compare: CompareService, make_compare: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, watched = Engine.answer, []

    def timed(engine: Engine, messages: Any, sampling: Any, *rest: Any) -> Any:
        began = time.perf_counter()
        result = answer(engine, messages, sampling, *rest)
        if sampling.max_new_tokens > 2:  # not the warm-up
            watched.append(time.perf_counter() - began)
        return result

    monkeypatch.setattr(Engine, "answer", timed)
    request = make_compare("int8", tokens=150)
    events = list(compare.stream(request))
    cells: dict[tuple[str, str], float] = {}
    for event in only(events, CellDone):
        cells[event.cell["query"], event.cell["method"]] = event.cell["metrics"]["total_s"]
    assert len(cells) == len(watched) == 4
    assert list(cells.values()) == pytest.approx(watched, rel=0.05)


def test_failing_method_marks_its_cells_and_the_rest_finishes(compare: CompareService, make_compare: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []

    def refuse(self: WordRemoval, bundle: Bundle) -> None:
        checks.append(None)
        raise UnsupportedModel("word_removal does not like this model.")

    monkeypatch.setattr(WordRemoval, "check", refuse)
    record = finish(compare, make_compare("word_removal:every=5", "int8"))
    assert record["complete"] is True
    assert [(c["status"], c["error"]) for c in cells_of(record, "word_removal:every=5")] == [("failed", "word_removal does not like this model.")] * 2
    assert all(c["status"] == "done" for m in ("baseline", "int8") for c in cells_of(record, m))
    row = record["rows"][1]
    assert (row["done"], row["failed"], row["error"], row["metrics"], row["label"]) == (0, 2, "word_removal does not like this model.", {}, None)
    assert len(checks) == 1  # not once a cell


def test_crash_in_an_answer_is_that_cells_own(compare: CompareService, make_compare: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Engine.answer

    def broken(engine: Engine, messages: Any, *rest: Any) -> Any:
        if engine.method == "word_removal" and "time" in messages[0]["content"]:
            raise RuntimeError("a bad day")
        return answer(engine, messages, *rest)

    monkeypatch.setattr(Engine, "answer", broken)
    record = finish(compare, make_compare("word_removal"))
    assert [c["status"] for c in cells_of(record, "word_removal")] == ["done", "failed"]
    assert "a bad day" in cells_of(record, "word_removal")[1]["error"]
    assert record["rows"][1]["error"] is None and record["rows"][1]["failed"] == 1


def test_without_the_baselines_answer_quality_is_not_measured_and_the_reason_is_said(compare: CompareService, make_compare: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Engine.answer

    def broken(engine: Engine, *rest: Any) -> Any:
        if engine.method == "baseline":
            raise RuntimeError("a bad day")
        return answer(engine, *rest)

    monkeypatch.setattr(Engine, "answer", broken)
    record = finish(compare, make_compare("word_removal"))
    for cell in cells_of(record, "word_removal"):
        assert cell["status"] == "done" and cell["metrics"]["agreement_share"] is None and cell["metrics"]["distinct_2"] is not None
        assert cell["notes"] == ["the baseline gave no answer to compare with"]
    assert "rouge_l" not in record["rows"][1]["metrics"]


def test_failed_scoring_keeps_the_answer_and_says_so(compare: CompareService, make_compare: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no score today")

    monkeypatch.setattr(quality_module, "score_continuation", fail)
    record = finish(compare, make_compare("word_removal"))
    assert record["complete"] is True
    for cell in record["cells"]:
        assert cell["status"] == "done" and cell["metrics"]["rouge_l"] is None
        assert "no score today" in cell["notes"][0]


def test_model_that_cannot_be_loaded_fails_its_cells_and_the_other_runs(compare: CompareService, make_compare: Make) -> None:
    request = make_compare("word_removal")
    record = finish(compare, replace(request, models=("./nowhere", *request.models)))
    assert [c["status"] for c in record["cells"]] == ["failed"] * 4 + ["done"] * 4
    assert all("no such folder" in c["error"] for c in record["cells"][:4])
    assert [r["model"] for r in record["rows"]] == ["nowhere", "nowhere", "llama", "llama"]
    assert record["models"][0] == {"model_id": "nowhere", "revision": None, "dtype": None, "source": None, "dtype_choice": None}


def test_too_long_a_query_fails_alone(compare: CompareService, make_compare: Make) -> None:
    long = replace(QUERIES[0], id="long", question="word " * 600)
    record = finish(compare, make_compare("word_removal", queries=(long, QUERIES[1])))
    assert [c["status"] for c in record["cells"]] == ["failed", "failed", "done", "done"]
    assert "takes 256 in all" in record["cells"][0]["error"] and "8 new ones" in record["cells"][0]["error"]


def test_stop_ends_within_a_token_and_leaves_the_rest_pending(compare: CompareService, make_compare: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines import generation

    decode, steps, stop = generation.decode_one_token, [0], Stop()

    def counting(bundle: Bundle, *rest: Any) -> Any:
        steps[0] += 1
        if steps[0] == 10:
            stop.request()
        return decode(bundle, *rest)

    finish(compare, make_compare("word_removal"))  # engines are built
    monkeypatch.setattr(generation, "decode_one_token", counting)
    record = finish(compare, make_compare("word_removal", tokens=50), stop)
    assert steps[0] == 10
    assert record["complete"] is False
    assert [c["status"] for c in record["cells"]] == ["cancelled", "pending", "pending", "pending"]
    assert record["rows"][0]["done"] == 0 and record["rows"][0]["metrics"] == {}


def test_closing_the_iterator_ends_the_thread(compare: CompareService, make_compare: Make) -> None:
    stream = compare.stream(make_compare("word_removal", tokens=100))
    while not isinstance(next(stream), CellStarted):
        pass
    began = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "compare"]
    assert time.monotonic() - began < 5
    with compare.gate.hold(Stop()) as held:
        assert held


def test_progress_rises_to_the_end_and_tells_the_time_left(compare: CompareService, make_compare: Make) -> None:
    events = list(compare.stream(make_compare("word_removal", repeats=2)))
    told = only(events, Progress)
    assert all(a.fraction <= b.fraction for a, b in zip(told, told[1:], strict=False))
    assert told[0].seconds_left is None
    assert told[-1].fraction == 1 and told[-1].seconds_left == 0
    assert any(p.seconds_left for p in told)
    assert isinstance(events[-1], Finished)


def test_time_left_is_reckoned_from_measured_cells(make_compare: Make) -> None:
    comparison = Comparison(checked_request(make_compare("word_removal", "int8"), "cpu"), "", {})
    pace, planned = Pace(comparison), list(comparison.planned())
    assert (pace.fraction, pace.seconds_left) == (0, None)
    for key, seconds in ((planned[0], 1.0), (planned[1], 3.0)):
        comparison.cells[key] = {"status": "done", "scored": False}
        pace.update(key)
        pace.measured("answer", key, seconds)
    # answers left: baseline 1, word_removal 3, int8 twice 2 (the mean); six scores as long as answers take, 2 on average
    assert pace.seconds_left == 1 + 3 + 2 * 2 + 6 * 2
    pace.measured("score", planned[0], 0.5)
    assert pace.seconds_left == 1 + 3 + 2 * 2 + 6 * 0.5
    assert pace.fraction == pytest.approx(2 / 12)
    for key in planned:
        comparison.cells[key] = {"status": "failed"}
        pace.update(key)
    assert (pace.fraction, pace.seconds_left) == (1, 0)


def test_a_chat_gets_its_turn_between_two_cells(compare: CompareService, make_compare: Make) -> None:
    gate = DeviceGate()
    service = CompareService(compare.pool, gate)
    stream = service.stream(make_compare("word_removal", queries=QUERIES, repeats=3, tokens=30))
    while not isinstance(next(stream), CellStarted):
        pass
    began = time.perf_counter()
    with gate.hold(Stop()) as held:
        waited = time.perf_counter() - began
        assert held
    rest = list(stream)
    answers = [e.cell["metrics"]["total_s"] for e in rest if isinstance(e, CellDone)]
    assert waited < sum(answers) / 3
    assert rest[-1].record["complete"] is True


def test_two_comparisons_at_once_both_finish(compare: CompareService, make_compare: Make) -> None:
    records: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: records.append(finish(compare, make_compare("word_removal")))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [r["complete"] for r in records] == [True, True]


def test_engines_are_warmed_with_each_query_before_it_is_timed(make_compare: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, asked = Engine.answer, []

    def noted(engine: Engine, messages: Any, sampling: Any, *rest: Any) -> Any:
        asked.append((engine.method, messages[0]["content"], sampling.max_new_tokens))
        return answer(engine, messages, sampling, *rest)

    monkeypatch.setattr(Engine, "answer", noted)
    finish(CompareService(EnginePool()), make_compare("word_removal", repeats=2))
    for method in ("baseline", "word_removal"):
        for query in QUERIES[:2]:
            assert [n for m, q, n in asked if (m, q) == (method, query.question)] == [2, 8, 8]
