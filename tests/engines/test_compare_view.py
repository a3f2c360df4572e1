"""Reading a record: finite numbers only, states, order, half-filled records."""

from __future__ import annotations

import pytest

from engines.compare_view import definition, failure_notes, model_view, model_views, number, spread_of
from tests.engines.compare_records import THIRTEEN, make_record


@pytest.mark.parametrize("value", [None, True, float("nan"), float("inf"), "3", [1]])
def test_only_finite_numbers_are_numbers(value: object) -> None:
    assert number(value) is None
    assert spread_of({"median": value}) is None


def test_spread_without_percentiles_ends_at_its_median() -> None:
    spread = spread_of({"median": 2, "p10": None, "p90": float("nan"), "n": 1})
    assert spread is not None
    assert (spread.p10, spread.p90, spread.highest, spread.count) == (None, None, 2.0, 1)


def test_states_of_methods() -> None:
    view = model_view(make_record(methods=("baseline", "int8", "chai", "mpo"), failing={"chai": "no"}, one_fails=("int8",), pending=("mpo",)))
    assert view is not None
    assert {r.method: r.state for r in view.rows} == {"baseline": "measured", "int8": "measured", "chai": "failed", "mpo": "waiting"}
    assert failure_notes(view) == ["int8: 1 of 2 answers failed: Memory ran out while answering.", "chai failed: no."]


def test_a_method_whose_cells_were_all_cancelled_does_not_wait() -> None:
    record = make_record(methods=("baseline", "mpo"), pending=("mpo",))
    for cell in record["cells"]:
        cell["status"] = "cancelled" if cell["method"] == "mpo" else cell["status"]
    view = model_view(record)
    assert view is not None
    assert [r.state for r in view.rows] == ["measured", "cancelled"]
    next(c for c in record["cells"] if c["method"] == "mpo")["status"] = "pending"
    again = model_view(record)
    assert again is not None
    assert again.rows[1].state == "waiting"


def test_cells_alone_are_enough_for_names_and_values() -> None:
    record = make_record(methods=("baseline", "int8"))
    view = model_view({"models": record["models"], "cells": record["cells"]})
    assert view is not None
    assert view.methods == ("baseline", "int8")
    assert view.values("int8", "output_tokens") == [c["metrics"]["output_tokens"] for c in record["cells"] if c["method"] == "int8"]
    assert definition(view.record, "ttft_s")["unit"] == "s"


def test_sorting_puts_the_baseline_first_and_the_unmeasured_last() -> None:
    view = model_view(make_record(methods=THIRTEEN, failing={"larosa": "no"}))
    assert view is not None
    order = view.sorted_methods("decode_tok_s")
    assert (order[0], order[-1]) == ("baseline", "larosa")
    speeds = [s.median for m in order[1:-1] if (s := view.spread(m, "decode_tok_s"))]
    assert speeds == sorted(speeds, reverse=True)


def test_models_are_kept_apart() -> None:
    one, two = model_views(make_record(models=("one", "two")))
    assert one.values("int8", "decode_tok_s") != two.values("int8", "decode_tok_s")
    assert len(one.cells) == len(two.cells)


def test_an_empty_record_has_no_view() -> None:
    assert model_views({}) == []
    assert model_view({}) is None
