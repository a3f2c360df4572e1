"""One cell of a comparison as plain values: an answer with its metrics, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engines.compare.comparison import ANSWERED, CANCELLED, FAILED, PENDING, Comparison
from engines.compare.plan import CellKey
from engines.engine import Answer
from engines.export import answer_record, plain
from engines.metrics import ChatMetrics
from engines.quality import of_text

_KEPT_BACK = ("token_ids", "scored")  # what the next start needs and no reader does


@dataclass(frozen=True)
class KeptAnswer:
    """An answer read back from its cell, as far as its quality needs it."""

    text: str
    token_ids: Sequence[int]


def answered_cell(answer: Answer, keywords: Sequence[str]) -> dict[str, Any]:
    """An answer with what its text alone says of its quality; not yet scored against the baseline's."""
    values = answer_record(answer)
    values["metrics"] = plain({**values["metrics"], **of_text(answer.text, keywords)})
    status = CANCELLED if answer.metrics.finish_reason == "stopped" else ANSWERED
    return {**_empty(status), **{k: values[k] for k in _empty(status) if k in values}, "token_ids": list(answer.token_ids)}


def failed_cell(words: str) -> dict[str, Any]:
    """A cell without an answer, and why."""
    return {**_empty(FAILED), "error": words}


def scored_cell(cell: Mapping[str, Any], quality: Mapping[str, Any], note: str | None = None) -> dict[str, Any]:
    """The cell with its quality against the baseline's answer; `note` says why that was not measured."""
    return {**cell, "metrics": {**cell["metrics"], **plain(quality)}, "scored": True, "notes": [*cell["notes"], *([note] if note else [])]}


def kept_answer(cell: Mapping[str, Any]) -> KeptAnswer:
    """The answer that a cell holds."""
    return KeptAnswer(cell["text"], cell["token_ids"])


def public_cell(comparison: Comparison, key: CellKey) -> dict[str, Any]:
    """A cell as it stands in the record; one that has not run yet is pending and empty."""
    request = comparison.request
    cell = comparison.cells.get(key) or _empty(PENDING)
    names = {"model": comparison.labels[key.model], "method": request.methods[key.method], "query": request.queries[key.query].id, "repeat": key.repeat}
    return {**names, **{k: v for k, v in cell.items() if k not in _KEPT_BACK}}


def _empty(status: str) -> dict[str, Any]:
    return {
        "status": status, "error": None, "text": "", "prompt": None, "prompt_sha256": None, "metrics": asdict(ChatMetrics()), "token_gaps_s": [],
        "reports": [], "notes": [], "token_ids": [], "scored": False,
    }
