"""Results as files: strict JSON, CSV no spreadsheet evaluates, whole files or none, no secrets."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.bundle import ModelInfo
from core.files import write_text
from core.provenance import provenance
from engines.chat import ChatRequest, ChatService, collect
from engines.dtype_choice import DtypeChoice
from engines.engine import Answer
from engines.export import answer_record, chat_record, plain, safe_cell, to_csv, to_json
from engines.metrics import METRICS, ChatMetrics
from engines.pool import EnginePool
from engines.prompting import Prompt

NAN = float("nan")
MODEL = ModelInfo("tiny", "abc", "float32", "local")


def made(text: str = "An answer.", **metrics: Any) -> Answer:
    """An answer nobody computed."""
    return Answer("baseline", text, (1, 2), Prompt((3, 4, 5), "<|user|>Q<|end|>", 3), (0.25,), MODEL, replace(ChatMetrics(ttft_s=0.5, output_tokens=2), **metrics), ())


@pytest.fixture(scope="module")
def comparison(model_folder: Path) -> tuple[ChatRequest, dict[str, Answer], dict[str, str]]:
    """A real comparison with one failed column."""
    request = ChatRequest("Please explain how the machines learn from many examples.", ("baseline", "bnb_int8+word_removal", "word_removl"), str(model_folder),
                          dtype="float32", reverse=True)
    answers, errors = collect(ChatService(EnginePool()).stream(request))
    return request, answers, errors


@pytest.fixture
def fresh_provenance() -> Iterator[None]:
    """Provenance is cached; a test that changes the environment needs it read again."""
    provenance.cache_clear()
    yield
    provenance.cache_clear()


def strict(text: str) -> Any:
    """JSON without the extensions that Python's parser takes."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# ---------------------------------------------------------------- JSON


def test_record_of_a_comparison_round_trips_as_strict_json(comparison: tuple[ChatRequest, dict[str, Answer], dict[str, str]]) -> None:
    request, answers, errors = comparison
    record = strict(to_json(chat_record(request, answers, errors, DtypeChoice("float32", {"float32": 0.001, "bfloat16": NAN}, "faster"))))
    assert record["model"] == {
        **asdict(answers["baseline"].model), "dtype_choice": {"dtype": "float32", "step_s": {"float32": 0.001, "bfloat16": None}, "reason": "faster"},
    }
    assert record["model"]["revision"]
    assert record["request"]["message"] == request.message
    assert record["request"]["sampling"]["seed"] == 0
    assert record["order"] == list(reversed(request.methods))
    assert set(record["answers"]) == {"baseline", "bnb_int8+word_removal"}
    assert record["errors"] == errors
    for column, answer in answers.items():
        mine = record["answers"][column]
        assert (mine["method"], mine["text"], mine["prompt"]) == (answer.method, answer.text, answer.prompt.text)
        assert mine["prompt_sha256"] == hashlib.sha256(answer.prompt.text.encode()).hexdigest()
        assert mine["metrics"] == asdict(answer.metrics)
        assert mine["token_gaps_s"] == pytest.approx(answer.gaps_s, abs=1e-6)
    reports = record["answers"]["bnb_int8+word_removal"]["reports"]
    assert [r["technique"] for r in reports] == ["word_removal", "bnb_int8"]
    assert {r["label"] for r in reports} <= {"simulated", "stored", "executed"}


def test_record_says_on_what_it_was_measured(comparison: tuple[ChatRequest, dict[str, Answer], dict[str, str]]) -> None:
    record = chat_record(*comparison, None)
    machine = record["provenance"]
    assert machine["packages"]["torch"] and machine["packages"]["transformers"]
    assert machine["threads"] >= 1
    assert machine["cpu"] and machine["python"]
    assert record["answers"]["baseline"]["metrics"]["dtype"] == "float32"
    assert set(record["definitions"]) == {f.name for f in fields(ChatMetrics)}
    assert all(d["definition"] for d in record["definitions"].values())


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
def test_number_that_json_has_not_becomes_null(value: float) -> None:
    record = strict(to_json({"a": value, "b": [value, {"c": (value, 1.5)}], "answers": {"x": answer_record(made(ttft_s=value))}}))
    assert record["a"] is None
    assert record["b"] == [None, {"c": [None, 1.5]}]
    assert record["answers"]["x"]["metrics"]["ttft_s"] is None


def test_not_measured_is_null_and_zero_is_zero() -> None:
    metrics = strict(to_json(answer_record(made(tpot_median_s=None, weights_packed_bytes=0))))["metrics"]
    assert metrics["tpot_median_s"] is None
    assert metrics["weights_packed_bytes"] == 0


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12,
)


@given(JSON_VALUES)
def test_plain_values_round_trip(value: Any) -> None:
    assert strict(to_json({"value": value})) == {"value": value}


def test_record_without_an_answer_names_the_model_that_was_asked_for() -> None:
    record = chat_record(ChatRequest("Q?", ("baseline",), "owner/name"), {}, {"baseline": "no such model"}, None)
    assert record["model"] == {"model_id": "owner/name", "dtype_choice": None}


def test_enums_are_written_by_value_and_keys_as_text() -> None:
    class Colour(Enum):
        RED = "red"

    assert plain({1: Colour.RED, "t": (1, 2)}) == {"1": "red", "t": [1, 2]}


def test_record_of_a_request_with_histories_is_json(comparison: tuple[ChatRequest, dict[str, Answer], dict[str, str]]) -> None:
    request, answers, errors = comparison
    told = replace(request, histories={"baseline": ({"role": "user", "content": "Hi \u2028 \"there\"</script>"},)})
    record = strict(to_json(chat_record(told, answers, errors, None)))
    assert record["request"]["histories"]["baseline"][0]["content"] == "Hi \u2028 \"there\"</script>"


@pytest.mark.usefixtures("fresh_provenance")
def test_secrets_of_the_environment_are_nowhere_in_a_record(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path,
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "secretvalue")
    (tmp_path / "token").write_text("secretvalue")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    request = ChatRequest("How do machines learn?", ("baseline", "nonsense"), str(model_folder), dtype="float32")
    answers, errors = collect(ChatService(EnginePool()).stream(request))
    record = chat_record(request, answers, errors, None)
    assert record["provenance"]["packages"]["torch"]  # it was really made
    assert "secretvalue" not in to_json(record) + to_csv(answers, errors)
    assert os.environ["HF_TOKEN"] == "secretvalue"
    assert str(Path.home()) + "/" not in json.dumps(record["provenance"])


# ---------------------------------------------------------------- CSV


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_text_that_a_spreadsheet_would_run_is_neutralised_in_every_cell(start: str) -> None:
    evil = start + 'HYPERLINK("http://example.org","x")'
    rows = rows_of(to_csv({evil: made(evil, finish_reason=evil)}, {evil + "2": evil}))
    assert len(rows) == 2
    cells = [cell for row in rows for cell in row.values()]
    assert "'" + evil in cells
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)


@pytest.mark.parametrize("text", [" =1+1", "\n=1+1", "\ufeff=1+1", "\u200b=1+1", "＝1+1", "＋1", "－1", "＠x", "\x0b=1"])
def test_formula_behind_blanks_or_in_fullwidth_is_neutralised(text: str) -> None:
    """Spreadsheets trim what they import, and some read fullwidth signs as plain ones."""
    assert safe_cell(text) == "'" + text


@given(st.text())
def test_no_text_survives_as_a_formula(text: str) -> None:
    cell = safe_cell(text)
    assert cell.endswith(text)
    assert not cell.strip().startswith(("=", "+", "-", "@"))


@pytest.mark.parametrize("value", [-1, -0.5, 0, 7, 1e-9, True, None])
def test_numbers_stay_numbers(value: Any) -> None:
    assert safe_cell(value) is value


def test_harmless_text_is_left_alone() -> None:
    for text in ("", "a=b", "x-1", "mail@example.org", "'quoted'", "5 + 5", "é"):
        assert safe_cell(text) == text


def test_csv_round_trips_text_and_numbers() -> None:
    text = 'two\nlines, "quotes"; semicolons\r\nand 中文 😀'
    rows = rows_of(to_csv({"baseline": made(text, ttft_s=0.125, decode_tok_s=None)}, {"bad": "no, \"such\"\nmethod"}))
    assert rows[0]["method"] == "baseline"
    assert rows[0]["text"] == text
    assert float(rows[0]["ttft_s"]) == 0.125
    assert rows[0]["output_tokens"] == "2"
    assert rows[0]["decode_tok_s"] == rows[0]["error"] == ""
    assert (rows[1]["method"], rows[1]["error"], rows[1]["ttft_s"]) == ("bad", "no, \"such\"\nmethod", "")
    assert list(rows[0]) == ["method", "text", "error", *METRICS]


def test_csv_never_holds_a_bare_nan() -> None:
    row = rows_of(to_csv({"baseline": made(ttft_s=NAN, total_s=float("inf"))}, {}))[0]
    assert (row["ttft_s"], row["total_s"]) == ("", "")


def test_csv_of_a_real_comparison_has_a_row_for_every_column(comparison: tuple[ChatRequest, dict[str, Answer], dict[str, str]]) -> None:
    request, answers, errors = comparison
    rows = rows_of(to_csv(answers, errors))
    assert {r["method"] for r in rows} == set(request.methods)
    for row in rows:
        assert bool(row["error"]) != bool(row["ttft_s"])


def test_csv_of_nothing_is_its_header() -> None:
    assert rows_of(to_csv({}, {})) == []
    assert to_csv({}, {}).startswith("method,text,error,ttft_s")


# ---------------------------------------------------------------- files


def test_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_text(path, "old")
    write_text(path, "new 中文 \r\n end")
    assert path.read_bytes() == "new 中文 \r\n end".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_kill_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    write_text(path, "old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_text_that_cannot_be_encoded_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_failed_rename_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_lone_surrogate_in_a_record_can_be_written(comparison: tuple[ChatRequest, dict[str, Answer], dict[str, str]], tmp_path: Path) -> None:
    """A client may have sent one in a history; the file of the comparison must still be made."""
    request, answers, errors = comparison
    told = replace(request, histories={"baseline": ({"role": "user", "content": "a \ud800 b"},)})
    write_text(tmp_path / "r.json", to_json(chat_record(told, answers, errors, None)))
    assert strict((tmp_path / "r.json").read_text("utf-8"))["request"]["histories"]["baseline"][0]["content"].startswith("a ")


def test_two_writers_do_not_mix_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writer runs whole between the first one's write and rename."""
    path, rename = tmp_path / "r.json", os.replace
    nested: list[Callable[[], None]] = [lambda: write_text(path, "second" * 1000)]

    def replace_slowly(source: Any, target: Any) -> None:
        if nested:
            nested.pop()()
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace_slowly)
    write_text(path, "first")
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
