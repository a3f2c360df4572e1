"""A combination of techniques as one small JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from core.errors import InvalidRequest
from core.files import write_text

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """A model and the techniques to put on it, in order; `prepared` maps a technique's name to its safetensors file."""

    model_id: str
    revision: str | None = None
    techniques: tuple[Mapping[str, Any], ...] = ()  # {"name": ..., **settings}
    prepared: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the recipe; the old file stays whole until the new one is."""
        write_text(path, json.dumps({"schema": SCHEMA_VERSION, **asdict(self)}, indent=1))

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe.

        Raises:
            InvalidRequest: not JSON, another schema, or fields missing.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidRequest(f"The recipe {path} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{path.name} is not UTF-8 text, so it is no recipe.") from error
        except json.JSONDecodeError as error:
            raise InvalidRequest(f"The recipe {path.name} is not JSON: line {error.lineno}, {error.msg}.") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA_VERSION:
            raise InvalidRequest(f"{path.name} is not a recipe of schema {SCHEMA_VERSION}.")
        techniques, prepared = data.get("techniques", []), data.get("prepared", {})
        if not isinstance(data.get("model_id"), str):
            raise InvalidRequest(f"{path.name}: model_id is missing or no text.")
        if not isinstance(data.get("revision"), (str, type(None))):
            raise InvalidRequest(f"{path.name}: revision is no text.")
        if not isinstance(techniques, (list, dict)):
            raise InvalidRequest(f"{path.name}: techniques is no list.")
        if not all(isinstance(t, dict) and isinstance(t.get("name"), str) for t in techniques):
            raise InvalidRequest(f"{path.name}: there is a technique without a name.")
        if not isinstance(prepared, dict):
            raise InvalidRequest(f"{path.name}: prepared is no table.")
        return cls(data["model_id"], data.get("revision"), tuple(techniques), prepared)
