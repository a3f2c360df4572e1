"""What a comparison refuses before it begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import engines.compare.request as request_module
from core.errors import InvalidRequest
from engines.catalog import TECHNIQUES
from engines.compare.queries import Query, built_in_queries
from engines.compare.request import CompareRequest, checked_request
from engines.compare.service import CompareService
from engines.sampling import Sampling

Make = Callable[..., CompareRequest]


def test_empty_request_is_every_method_on_the_built_in_queries() -> None:
    full = checked_request(CompareRequest(), "cpu")
    assert full.queries == built_in_queries()
    assert full.methods == ("baseline", *TECHNIQUES, "all_combined")
    assert full.device == "cpu"


def test_quick_asks_for_thirty_tokens_at_most() -> None:
    assert checked_request(CompareRequest(quick=True), "cpu").sampling.max_new_tokens == 30
    assert checked_request(CompareRequest(quick=True, sampling=Sampling(7)), "cpu").sampling.max_new_tokens == 7


@pytest.mark.parametrize(
    ("typed", "columns"),
    [
        (("int8",), ("baseline", "int8")),
        (("int8", "baseline", " int8 "), ("baseline", "int8")),
        (("word_removal", "word_removal:every=3", "word_removal:every=4"), ("baseline", "word_removal", "word_removal:every=4")),
        (("all",), ("baseline", *TECHNIQUES, "all_combined")),
        (("int8+word_removal", "word_removal+int8"), ("baseline", "int8+word_removal")),
    ],
)
def test_columns_are_the_baseline_and_each_method_once(typed: tuple[str, ...], columns: tuple[str, ...]) -> None:
    assert checked_request(CompareRequest(methods=typed), "cpu").methods == columns


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": ("mpo",)}, "There is no method 'mpo'.*all_combined"),
        ({"methods": ("hybrid_kv_cache",)}, "There is no method 'hybrid_kv_cache'"),
        ({"methods": "int8"}, "must be a list"),
        ({"repeats": 0}, "repeats is 0"),
        ({"repeats": 51}, "repeats is 51"),
        ({"repeats": True}, "repeats is True"),
        ({"repeats": 1.5}, "repeats is 1.5"),
        ({"models": ()}, "No model"),
        ({"models": ("embedded", " ")}, "No model"),
        ({"models": tuple(f"a/{n}" for n in range(9))}, "9 models"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"queries": (Query("a", "own", "x"), Query("a", "own", "y"))}, "same id"),
        ({"queries": (Query("a", "own", " \u200b"),)}, "empty"),
        ({"queries": (Query("a", "own", "x" * 20_001),)}, "20,001 characters"),
        ({"queries": tuple(Query(str(n), "own", "x") for n in range(1001))}, "1,001 queries"),
        ({"queries": tuple(Query(str(n), "own", "x") for n in range(1000)), "repeats": 50}, "at most 50,000"),
        ({"sampling": None}, "sampling"),
    ],
)
def test_unusable_request_is_refused_in_words(change: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        checked_request(replace(CompareRequest(), **change), "cpu")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="NOT RUN: this machine has a CUDA device")
def test_cuda_without_cuda_is_said(compare: CompareService, make_compare: Make) -> None:
    with pytest.raises(InvalidRequest, match="finds no CUDA device here"):
        compare.stream(make_compare(device="cuda"))


def test_other_device_than_the_services_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "check_device", lambda device: device)  # as if there were one
    assert checked_request(CompareRequest(device="cuda"), "cuda").device == "cuda"
    with pytest.raises(InvalidRequest, match="device is cpu, and the engines of this service run on cuda"):
        checked_request(CompareRequest(device="cpu"), "cuda")


def test_values_are_read_back_as_the_same_request(make_compare: Make) -> None:
    full = checked_request(make_compare("word_removal", repeats=2), "cpu")
    assert CompareRequest.from_values(full.values()) == full
