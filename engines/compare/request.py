"""What is compared: the request, checked as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from core.errors import InvalidRequest
from engines.compare.queries import MAX_CHARACTERS, MAX_QUERIES, Query, built_in_queries
from engines.device import check_device
from engines.methods import BASELINE, depends_on_model, expand_all, method_name, method_names, parse_method
from engines.pool import AUTO, check_dtype
from engines.prompting import clean_message
from engines.sampling import Sampling

QUICK_TOKENS = 30
MAX_MODELS, MAX_REPEATS, MAX_METHODS, MAX_CELLS = 8, 50, 64, 50_000


@dataclass(frozen=True)
class CompareRequest:
    """Queries x methods x repeats x models under one sampling (with its seed) for all.

    queries: the built-in five when empty. methods: every offered one when empty or "all"; the baseline is always measured, first, as reference.
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

    def values(self) -> dict[str, Any]:
        """What decides the cells, as plain values; where they are kept does not."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("output", "fresh")}
        return {**kept, "queries": [{**q, "keywords": list(q["keywords"])} for q in kept["queries"]], "methods": list(self.methods), "models": list(self.models)}

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> CompareRequest:
        """What `values` wrote."""
        queries = tuple(Query(q["id"], q["kind"], q["question"], tuple(q["keywords"])) for q in values["queries"])
        plain = {k: values[k] for k in ("repeats", "dtype", "device", "quick")}
        return cls(queries, tuple(values["methods"]), tuple(values["models"]), sampling=Sampling(**values["sampling"]), **plain)


def checked_request(request: CompareRequest, own_device: str) -> CompareRequest:
    """The request with everything that was left open filled in.

    Raises:
        InvalidRequest, IncompatibleTechniques: says what, which value, what to do.
    """
    if not isinstance(request.sampling, Sampling):
        raise InvalidRequest("sampling is no Sampling.")
    sampling = replace(request.sampling, max_new_tokens=min(QUICK_TOKENS, request.sampling.max_new_tokens)) if request.quick else request.sampling
    full = replace(
        request, queries=_checked_queries(request.queries or built_in_queries()), methods=_checked_methods(request.methods or method_names()),
        models=_checked_models(request.models), sampling=sampling, dtype=check_dtype(request.dtype), device=_checked_device(request.device, own_device),
    )
    if isinstance(full.repeats, bool) or not isinstance(full.repeats, int) or not 1 <= full.repeats <= MAX_REPEATS:
        raise InvalidRequest(f"repeats is {str(full.repeats)[:30]}; it must be a whole number between 1 and {MAX_REPEATS}.")
    cells = len(full.queries) * len(full.methods) * len(full.models) * full.repeats
    if cells > MAX_CELLS:
        raise InvalidRequest(f"Queries x methods x models x repeats are {cells:,} answers; at most {MAX_CELLS:,} are taken. Ask fewer queries or methods.")
    return full


def _checked_queries(queries: Sequence[Query]) -> tuple[Query, ...]:
    if len(queries) > MAX_QUERIES:
        raise InvalidRequest(f"There are {len(queries):,} queries; at most {MAX_QUERIES:,} are taken.")
    if len({q.id for q in queries}) < len(queries):
        raise InvalidRequest("Two queries have the same id. Give each its own.")
    for query in queries:
        if len(query.question) > MAX_CHARACTERS:
            raise InvalidRequest(f"The query {query.id[:60]!r} has {len(query.question):,} characters; at most {MAX_CHARACTERS:,} are taken.")
    return tuple(replace(q, question=clean_message(q.question)) for q in queries)


def _checked_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """The names, the baseline first, and of several spellings of one method the first."""
    if not isinstance(methods, (list, tuple)) or not all(isinstance(m, str) for m in methods):
        raise InvalidRequest('The methods must be a list of names, for example ["baseline", "bnb_int8"].')
    spelled: dict[str, str] = {}
    for name in expand_all((BASELINE, *methods)):
        spelled.setdefault(name if depends_on_model(name) else method_name(parse_method(name)), name)
    if len(spelled) > MAX_METHODS:
        raise InvalidRequest(f"{len(spelled)} methods are asked for; at most {MAX_METHODS} are taken.")
    return tuple(spelled.values())


def _checked_models(models: Sequence[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(m.strip() for m in models if isinstance(m, str)))
    if not names or not all(names):
        raise InvalidRequest("No model is named. Use embedded, owner/name of the hub, or a local folder.")
    if len(names) > MAX_MODELS:
        raise InvalidRequest(f"{len(names)} models are asked for; at most {MAX_MODELS} are taken.")
    return names


def _checked_device(device: str | None, own: str) -> str:
    asked = check_device(own if device is None else device)
    if asked != own:
        raise InvalidRequest(f"device is {asked}, and the engines of this service run on {own}. Leave it out, or start the service on {asked}.")
    return asked
