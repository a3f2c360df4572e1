"""What the embedded chat model is, in one line for people."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from engines.embedded.instructions import CORPUS

MODEL = Path(__file__).resolve().parent.parent.parent / "assets" / "models" / "chat"


@cache
def about_embedded_chat() -> str:
    """Size, topics and manners of the model that ships with the app; the figures are counted, not typed in."""
    topics = sum(1 for path in sorted((CORPUS / "topics").glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    index = json.loads((MODEL / "model.safetensors.index.json").read_text(encoding="utf-8"))
    millions = index["metadata"]["total_size"] / 2 / 1e6  # bf16
    return (
        f"The embedded model has {millions:.1f} million parameters and was trained from scratch for this app on {topics} topics of science, computing and AI. "
        "It recalls a short fact you gave it, shortens a text and mostly says so when it does not know; follow-up questions often miss. It is there to try techniques on."
    )
