"""What is compared: the request, checked as a whole before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from engines.compare.queries import Query
from engines.pool import AUTO
from engines.sampling import Sampling

QUICK_TOKENS = 30


@dataclass(frozen=True)
class CompareRequest:
    """Queries x methods x repeats x models under one sampling (with its seed) for all.

    queries: the built-in five when empty. methods: every offered one when empty; the baseline is always measured, first, as reference.
    models: embedded, owner/name of the hub, or folders. device: None is the service's own.
    output: folder that keeps each finished cell, so that the same request goes on where it ended; None keeps nothing.
    fresh: throw away what an earlier comparison left in `output`. quick: at most 30 new tokens.
    """

    queries: tuple[Query, ...] = ()
    methods: tuple[str, ...] = ()
    models: tuple[str, ...] = ("embedded",)
    repeats: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    dtype: str = AUTO
    device: str | None = None
    output: Path | None = None
    fresh: bool = False
    quick: bool = False
