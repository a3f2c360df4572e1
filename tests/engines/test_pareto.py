"""The Pareto front and the recommendation, against brute force over all methods."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidRequest
from engines.compare_view import model_view
from engines.pareto import SAME_SPEED, Limits, Point, breaches, front, points, recommend
from tests.engines.compare_records import make_record

MIB = 2**20
VALUES = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 5), st.integers(0, 4))


def record_of(values: dict[str, tuple[float, float, float, float]]) -> dict[str, Any]:
    """One cell a method: speed, MiB, bits lost, agreement."""
    figures = {
        m: {"decode_tok_s": s, "weights_in_use_bytes": b * MIB, "kv_committed_bytes": 0, "baseline_answer_bits_per_byte": 0.5 + loss, "agreement_share": a}
        for m, (s, b, loss, a) in values.items()
    }
    return make_record(methods=tuple(values), queries=1, figures=figures)


def worse_or_equal(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether b is at least as good as a everywhere and better somewhere; speed is negated before."""
    return all(y <= x for x, y in zip(a, b, strict=True)) and a != b


@given(st.lists(VALUES, min_size=1, max_size=7), st.integers(1, 7), st.integers(0, 6), st.integers(0, 5), st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_recommendation_equals_brute_force(values: list[tuple[int, int, int, int]], most_mib: int, most_loss: int, least_agreement: int, least_speed: int) -> None:
    table = {"baseline": (3.0, 4.0, 0.0, 1.0)} | {f"m{n}": (float(s), float(b), loss / 10, a / 5) for n, (s, b, loss, a) in enumerate(values)}
    limits = Limits(most_mib * MIB, most_loss / 10 + 0.01, least_agreement / 5 - 0.01 if least_agreement else None, least_speed - 0.5 if least_speed else None)
    fits = {
        m: (-s, b, loss) for m, (s, b, loss, a) in table.items()
        if b <= most_mib and loss <= most_loss / 10 + 0.01 and (not least_agreement or a >= least_agreement / 5 - 0.01) and (not least_speed or s >= least_speed - 0.5)
    }
    best = {m: v for m, v in fits.items() if not any(worse_or_equal(v, w) for w in fits.values())}
    advice = recommend(record_of(table), limits)
    assert set(advice.excluded) | set(advice.alternatives) | {advice.method} - {None} == set(table)
    if not best:
        assert advice.method is None
        assert set(advice.excluded) == set(table)
        return
    top = max(-v[0] for v in best.values())
    wanted = min((v[2], v[1]) for v in best.values() if -v[0] >= top * (1 - SAME_SPEED))
    assert advice.method is not None
    assert (table[advice.method][2], table[advice.method][1]) == pytest.approx(wanted)
    assert {advice.method, *advice.alternatives} == set(best)


@given(st.lists(VALUES, max_size=8))
def test_front_is_what_no_other_point_dominates(values: list[tuple[int, int, int, int]]) -> None:
    candidates = [Point(str(n), s, b, loss, a) for n, (s, b, loss, a) in enumerate(values)]
    keys = [(-p.speed_tok_s, p.memory_bytes, p.loss_bits_per_byte) for p in candidates]
    assert front(candidates) == [p for p, k in zip(candidates, keys, strict=True) if not any(worse_or_equal(k, other) for other in keys)]


def test_equally_fast_methods_are_named_and_the_one_that_loses_least_is_taken() -> None:
    advice = recommend(record_of({"baseline": (50, 9, 0, 1), "a": (100, 5, 0.2, 0.5), "b": (99, 6, 0.1, 0.5)}))
    assert advice.method == "b"
    assert any("As fast within 2%: a (100 tok/s" in r and "loses least" in r for r in advice.reasons)


def test_nothing_fits_says_which_limit_binds_and_by_how_much() -> None:
    advice = recommend(record_of({"baseline": (50, 9, 0, 1), "a": (100, 5, 0.2, 0.5)}), Limits(max_memory_bytes=4 * MIB))
    assert advice.method is None
    assert "memory 2 of 2" in advice.reasons[0]
    assert advice.reasons[1] == "Nearest is a: memory 5.0 MiB, limit at most 4.0 MiB, 1.0 MiB over."
    assert advice.reasons[2] == "It would fit with a memory limit of at most 5.0 MiB (by 1.0 MiB)."


def test_the_method_with_fewest_broken_limits_is_nearest() -> None:
    table = {"baseline": (50, 9, 0, 1), "a": (100, 5, 0.2, 0.5)}
    advice = recommend(record_of(table), Limits(max_memory_bytes=6 * MIB, max_loss_bits_per_byte=0.05, min_agreement=0.9))
    assert advice.method is None
    assert advice.reasons[1].startswith("Nearest is baseline: memory 9.0 MiB")
    assert "quality loss 0.2000 bits/byte, limit at most 0.0500 bits/byte, 0.1500 bits/byte over" in advice.excluded["a"]


def test_methods_without_figures_are_out_with_the_reason() -> None:
    record = make_record(
        methods=("baseline", "int8", "larosa", "chai", "mpo"), failing={"chai": "no such method"}, pending=("mpo",), unmeasured={"larosa": ("baseline_answer_bits_per_byte", "kv_committed_bytes")},
    )
    view = model_view(record)
    assert view is not None
    assert points(view)[1] == {"larosa": "memory and quality loss not measured", "chai": "failed: no such method", "mpo": "no answer yet"}
    excluded = recommend(record).excluded
    assert excluded["chai"] == "failed: no such method"


def test_without_a_baseline_the_reason_says_to_add_it() -> None:
    advice = recommend(make_record(methods=("int8", "larosa")))
    assert advice.method is None
    assert "Add it" in advice.reasons[0]


def test_agreement_that_was_not_measured_does_not_pass_a_limit_on_it() -> None:
    assert [b.words for b in breaches(Point("a", 1, 1, 0, None), Limits(min_agreement=0.1))] == ["agreement not measured"]


def test_the_second_model_can_be_asked_for() -> None:
    record = make_record(models=("one", "two"))
    assert recommend(record, model_id="two").method
    assert recommend(record, model_id="three").reasons == ("The record has no such model.",)
    assert recommend({}).method is None


@pytest.mark.parametrize("limits", [{"max_memory_bytes": -1}, {"min_agreement": 1.5}, {"min_speed_tok_s": float("nan")}, {"max_loss_bits_per_byte": True}])
def test_limits_that_make_no_sense_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(limits))):
        Limits(**limits)
