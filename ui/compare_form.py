"""What the form of the Compare tab asks for: as a request, and as the equal command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import InvalidRequest
from engines.compare.queries import Query, built_in_queries
from engines.compare.request import QUICK_TOKENS, CompareRequest
from engines.pareto import Limits
from engines.sampling import Sampling, sampling_from

OWN_FILE, BUILT_IN = "my file", "built in"
SAMPLING = ("max_new_tokens", "temperature", "seed")
MIB = 2**20


@dataclass(frozen=True)
class CompareForm:
    """The form's values. combinations: method names parted by blanks, lines, or semicolons. built_in: ids. own: queries of a file."""

    models: Sequence[str]
    methods: Sequence[str]
    combinations: str
    source: str
    built_in: Sequence[str]
    own: tuple[Query, ...]
    quick: bool
    repeats: Any
    dtype: str
    sampling: tuple[Any, ...]

    def request(self) -> CompareRequest:
        """The comparison asked for.

        Raises:
            InvalidRequest: says what, which value, what to do.
        """
        return CompareRequest(
            self._queries(), self._methods(), tuple(self.models), _whole(self.repeats, "repeats"),
            sampling_from(dict(zip(SAMPLING, self.sampling, strict=True))), self.dtype, quick=bool(self.quick),
        )

    def _methods(self) -> tuple[str, ...]:
        typed = re.sub(r"\s*\+\s*", "+", self.combinations or "")
        return ("baseline", *self.methods, *filter(None, re.split(r"[\s;]+", typed)))

    def _queries(self) -> tuple[Query, ...]:
        if self.source == OWN_FILE:
            if not self.own:
                raise InvalidRequest("There is no query of your own yet. Upload a CSV, JSON or text file, or choose the built-in queries.")
            return self.own
        chosen = tuple(q for q in built_in_queries() if q.id in self.built_in)
        if not chosen:
            raise InvalidRequest("No query is chosen. Tick at least one.")
        return chosen

    def command(self) -> str:
        """The command that runs the same comparison, or why there is none."""
        try:
            request = self.request()
        except InvalidRequest as error:
            return f"# {error}"
        words = ["python", "cli.py", "compare", *(["--quick"] if request.quick else []), "--methods", *request.methods]
        if self.source == OWN_FILE:
            words += ["--queries", "queries.csv"]
        elif request.queries != built_in_queries():
            words += ["--queries", "multi_query_results.json"]  # a record serves as a file of queries
        if request.models != ("embedded",):
            words += ["--models", *request.models]
        words += ["--repeats", str(request.repeats)]
        if request.dtype != "auto":
            words += ["--dtype", request.dtype]
        for name in SAMPLING:
            value = getattr(request.sampling, name)
            if value != getattr(Sampling(), name) and not (name == "max_new_tokens" and request.quick and value >= QUICK_TOKENS):
                words += ["--" + name.replace("_", "-"), f"{value:g}" if isinstance(value, float) else str(value)]
        return shlex.join([*words, "--report", "--output", "comparison"])


def limits_of(memory_mib: Any, loss: Any, agreement_percent: Any, speed: Any) -> Limits:
    """Limits from the form's fields; an empty or zero field is no limit.

    Raises:
        InvalidRequest: a value is out of range.
    """
    return Limits(
        memory_mib * MIB if memory_mib else None, loss if loss is not None and loss != "" else None,
        agreement_percent / 100 if agreement_percent else None, speed or None,
    )


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise InvalidRequest(f"{name} is {str(value)[:30]}; it must be a whole number.")
    return int(value)
