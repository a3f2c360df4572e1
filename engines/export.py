"""Results as files: JSON that any parser takes, CSV that no spreadsheet evaluates."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from enum import Enum
from typing import Any

from core.provenance import provenance
from engines.chat import ChatRequest
from engines.dtype_choice import DtypeChoice
from engines.engine import Answer
from engines.metrics import METRICS, ChatMetrics


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: enums by value, no NaN."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def answer_record(answer: Answer) -> dict[str, Any]:
    """One answer with everything that was measured of it."""
    return plain({
        "method": answer.method,
        "text": answer.text,
        "metrics": asdict(answer.metrics),
        "token_gaps_s": [round(g, 7) for g in answer.gaps_s],
        "prompt": answer.prompt.text,
        "prompt_sha256": hashlib.sha256(answer.prompt.text.encode()).hexdigest(),
        "reports": [asdict(r) for r in answer.reports],
    })


def chat_record(request: ChatRequest, answers: Mapping[str, Answer], errors: Mapping[str, str], choice: DtypeChoice | None) -> dict[str, Any]:
    """A whole comparison: the request, the model that answered, each column's answer or error, units, and provenance."""
    info = next((a.model for a in answers.values()), None)
    return plain({
        "request": {**asdict(request), "methods": list(request.methods), "calibration": calibration_record(request.calibration)},
        "order": list(reversed(request.methods)) if request.reverse else list(request.methods),
        "model": {**(asdict(info) if info else {"model_id": request.model_id}), "dtype_choice": asdict(choice) if choice else None},
        "answers": {column: answer_record(a) for column, a in answers.items()},
        "errors": dict(errors),
        "definitions": {name: {"definition": m["definition"], "unit": m["unit"]} for name, m in METRICS.items()},
        "provenance": provenance(),
    })


def calibration_record(text: str) -> dict[str, Any] | None:
    """Size and digest of a user's calibration text; None for the project's own."""
    data = text.encode("utf-8", "replace")
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} if text else None


def to_json(record: Mapping[str, Any]) -> str:
    """Strict JSON text."""
    text = json.dumps(plain(record), indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written


def safe_cell(value: Any) -> Any:
    """A CSV cell that spreadsheets show and do not run."""
    if not isinstance(value, str):
        return value
    # Spreadsheets skip blanks and invisible marks before a formula, and take fullwidth signs for plain ones.
    bare = "".join(c for c in value[:64] if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf"))
    is_formula = unicodedata.normalize("NFKC", bare[:1]) in ("=", "+", "-", "@")
    return "'" + value if is_formula or value[:1] in ("\t", "\r") else value


def to_csv(answers: Mapping[str, Answer], errors: Mapping[str, str]) -> str:
    """One row a column of the comparison; empty cells were not measured."""
    names = [f.name for f in fields(ChatMetrics)]
    rows: list[Sequence[Any]] = [["method", "text", "error", *names]]
    for column, answer in answers.items():
        values = plain(asdict(answer.metrics))
        rows.append([column, answer.text, "", *("" if values[n] is None else values[n] for n in names)])
    rows += [[column, "", message, *[""] * len(names)] for column, message in errors.items()]
    return csv_text(rows)


def csv_text(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as CSV that no spreadsheet evaluates; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text).writerows([[safe_cell(cell) for cell in row] for row in rows])
    return text.getvalue().encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written
