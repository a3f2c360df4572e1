"""What pages, commands and clients share: plain results, figures, text tables, percentiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.bundle import ModelInfo
from core.units import NOT_MEASURED
from engines.chat import MAX_COLUMNS, result_of
from engines.engine import Answer
from engines.figures import token_latency_figure
from engines.metric_text import format_metric, metrics_text
from engines.metrics import METRICS, ChatMetrics, percentile
from engines.prompting import Prompt

METRIC = ChatMetrics(ttft_s=0.5, output_tokens=3, weights_in_use_bytes=2**20, agreement_share=0.25, times_comparable=False, chars_s=12.345)
ANSWER = Answer("baseline", "An answer.", (1, 2, 3), Prompt((3,), "Q", 1), (0.25, 0.5), ModelInfo("tiny", "abc", "float32", "local"), METRIC, ())


def test_result_holds_texts_metrics_errors_and_the_latency_figure() -> None:
    result = result_of({"baseline": ANSWER}, {"bad": "no such method"})
    assert result.response == {"baseline": "An answer."}
    assert result.metrics["baseline"]["ttft_s"] == 0.5
    assert result.metrics["baseline"]["decode_tok_s"] is None
    assert result.errors == {"bad": "no such method"}
    assert list(result.figures) == ["token_latency"]


def test_result_of_nothing_is_empty_and_has_a_figure() -> None:
    result = result_of({}, {})
    assert (result.response, result.metrics, result.errors) == ({}, {}, {})
    assert len(result.figures["token_latency"].data) == 0


def test_latency_figure_shows_every_gap_in_milliseconds_from_the_second_token() -> None:
    line = token_latency_figure({"baseline": (0.25, 0.5)}).data[0]
    assert list(line.x) == [2, 3]
    assert list(line.y) == [250.0, 500.0]
    assert line.name == "baseline"


def test_latency_figure_shows_as_many_columns_as_can_be_asked_for() -> None:
    gaps = {f"column {n}": (0.1, 0.2) for n in range(MAX_COLUMNS)}
    assert [line.name for line in token_latency_figure(gaps).data] == list(gaps)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("ttft_s", 0.5, "500.0 ms"), ("ttft_s", None, NOT_MEASURED), ("weights_in_use_bytes", 2**20, "1.0 MiB"), ("weights_packed_bytes", 0, "0 B"),
        ("agreement_share", 0.25, "25.0 %"), ("agreement_share", 0.0, "0.0 %"), ("output_tokens", 1234, "1,234"), ("chars_s", 12.345, "12.3 chars/s"),
        ("times_comparable", False, "no"), ("times_comparable", True, "yes"), ("finish_reason", "eos", "eos"), ("dtype", "float32", "float32"),
    ],
)
def test_metric_is_written_with_its_unit(name: str, value: object, text: str) -> None:
    assert format_metric(name, value) == text


def test_table_has_a_row_for_what_any_column_measured_and_a_dash_where_one_did_not() -> None:
    table = metrics_text({"baseline": METRIC, "word_removal": replace(METRIC, ttft_s=None)})
    lines = {line.split("  ")[0].strip(): line for line in table.splitlines()}
    assert "500.0 ms" in lines["Time to first token"]
    assert lines["Time to first token"].endswith(NOT_MEASURED)
    assert "Decode speed" not in lines
    assert {len(line) for line in table.splitlines()} == {len(table.splitlines()[0])}
    assert metrics_text({}) == ""


def test_every_metric_has_a_definition_a_title_and_a_direction_that_exists() -> None:
    for name, meta in METRICS.items():
        assert meta["definition"].endswith("."), name
        assert meta["title"], name
        assert meta["better"] in (None, "low", "high"), name
        suffix = {"_s": "s", "_bytes": "bytes", "_tok_s": "tok/s", "chars_s": "chars/s"}
        if name.endswith("_bytes"):
            assert meta["unit"] == "bytes", name
        elif name.endswith("tok_s"):
            assert meta["unit"] == suffix["_tok_s"], name
        elif name.endswith("_s") and name != "chars_s":
            assert meta["unit"] == "s", name


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_percentile_equals_numpy(values: list[float], fraction: float) -> None:
    assert percentile(values, fraction) == pytest.approx(np.quantile(values, fraction), rel=1e-9, abs=1e-6)


def test_percentile_of_nothing_is_not_measured() -> None:
    assert percentile([], 0.9) is None
