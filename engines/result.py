"""What every backend returns to a page, a command or a client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Result:
    """response: texts by column. metrics: plain values by column. figures: plotly figures by name. errors: texts by column."""

    response: Mapping[str, str]
    metrics: Mapping[str, Mapping[str, Any]]
    figures: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
