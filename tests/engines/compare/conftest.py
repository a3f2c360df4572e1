"""Small requests to the tiny model, and services whose pool lives as long as a test module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from core.progress import Stop
from engines.compare.events import CompareEvent, Finished
from engines.compare.queries import Query
from engines.compare.request import CompareRequest
from engines.compare.service import CompareService
from engines.pool import EnginePool
from engines.sampling import Sampling

QUERIES = (
    Query("machines", "definition", "Please explain to me in a few simple words how the small machines learn from many examples", ("machines", "learn")),
    Query("time", "own", "What is the time of the teacher?"),
    Query("heat", "own", "Explain the heat of the Earth with the words of a teacher who has a little time.", ("Wärme",)),
)


@pytest.fixture(scope="module")
def compare() -> Iterator[CompareService]:
    yield CompareService(EnginePool())


@pytest.fixture
def make_compare(model_folder: Path) -> Callable[..., CompareRequest]:
    """Makes a request over the tiny model; `tokens` new tokens that no end token cuts short."""

    def make(*methods: str, queries: tuple[Query, ...] = QUERIES[:2], tokens: int = 8, seed: int = 0, temperature: float = 0.0, **settings: Any) -> CompareRequest:
        sampling = Sampling(tokens, temperature=temperature, seed=seed, ignore_eos=True)
        return CompareRequest(queries, methods or ("baseline",), **{"models": (str(model_folder),), "dtype": "float32", "sampling": sampling, **settings})

    return make


def finish(service: CompareService, request: CompareRequest, stop: Stop | None = None) -> dict[str, Any]:
    """The record at the end of a comparison."""
    last = list(service.stream(request, stop))[-1]
    assert isinstance(last, Finished), last
    return dict(last.record)


def cells_of(record: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    return [c for c in record["cells"] if c["method"] == method]


def only(events: list[CompareEvent], kind: type) -> list[Any]:
    return [e for e in events if isinstance(e, kind)]
