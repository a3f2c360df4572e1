"""Numbers as people read them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.units import NOT_MEASURED, format_bytes, format_number, format_percent, format_ratio, format_seconds, format_time_left

SIZES = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (200 * 1024, "200 KiB"), (1024**2, "1.0 MiB"),
    (10_485_760, "10.0 MiB"), (3 * 1024**3, "3.0 GiB"), (5000 * 1024**3, "5000 GiB"), (-1536, "-1.5 KiB"), (None, NOT_MEASURED),
])
def test_bytes(count: float | None, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("count", "text"), [(1024**2 - 1, "1.0 MiB"), (99.96 * 1024, "100 KiB")])
def test_bytes_at_the_edge_of_a_unit(count: float, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 2**50))
def test_bytes_read_back_to_within_the_digits_shown(count: int) -> None:
    number, unit = format_bytes(count).split(" ")
    assert float(number) * SIZES[unit] == pytest.approx(count, rel=0.05, abs=0.5)
    assert len(number) <= 7


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0, "0.00 ms"), (0.00123, "1.23 ms"), (0.0123, "12.3 ms"), (0.5, "500.0 ms"), (1, "1.00 s"), (59.5, "59.50 s"), (60, "1 min 0 s"), (75, "1 min 15 s"),
    (3700, "61 min 40 s"), (None, NOT_MEASURED),
])
def test_seconds(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.99999, "1.00 s"), (59.999, "1 min 0 s")])
def test_seconds_at_the_edge_of_a_unit(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (7, "7"), (1234567, "1,234,567"), (2.0, "2"), (1.2345, "1.23"), (12.345, "12.3"), (123.45, "123"), (1234.5, "1,234"), (0.0004567, "0.000457"),
    (-1.2345, "-1.23"), (float("nan"), NOT_MEASURED), (float("inf"), NOT_MEASURED), (None, NOT_MEASURED),
])
def test_number_to_three_digits(value: float | None, text: str) -> None:
    assert format_number(value) == text


@given(st.floats(1e-6, 1e12), st.integers(1, 6))
def test_number_reads_back_to_its_digits(value: float, digits: int) -> None:
    assert float(format_number(value, digits).replace(",", "")) == pytest.approx(value, rel=0.51 * 10 ** (1 - digits))


@pytest.mark.parametrize(("value", "reference", "text"), [
    (5, 4, "1.25x"), (1, 3, "0.33x"), (0, 4, "0.00x"), (None, 4, NOT_MEASURED), (4, None, NOT_MEASURED), (4, 0, NOT_MEASURED), (None, None, NOT_MEASURED),
])
def test_ratio(value: float | None, reference: float | None, text: str) -> None:
    assert format_ratio(value, reference) == text


@pytest.mark.parametrize(("fraction", "text"), [(0.253, "25.3 %"), (0, "0.0 %"), (1, "100.0 %"), (-0.5, "-50.0 %"), (None, NOT_MEASURED)])
def test_percent(fraction: float | None, text: str) -> None:
    assert format_percent(fraction) == text


def test_not_measured_is_never_a_number() -> None:
    assert not re.search(r"\d", NOT_MEASURED)


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (31.7, "32 s"), (89.4, "89 s"), (100, "2 min"), (3600, "60 min"), (5400, "1 h 30 min"), (9000, "2 h 30 min")])
def test_time_left_is_told_no_finer_than_an_estimate_is_good_for(seconds: float, text: str) -> None:
    assert format_time_left(seconds) == text
