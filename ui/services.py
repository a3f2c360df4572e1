"""What all tabs and clients of one running app share."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from core.loading import embedded_models
from engines.chat import ChatService
from engines.pool import EnginePool
from engines.sessions import SessionRegistry


def on_space() -> bool:
    """True when this runs as a Hugging Face Space: visitors are strangers, so local folders are closed."""
    return "SPACE_ID" in os.environ


@dataclass
class Services:
    """Engines and visitors. One instance an app."""

    chat: ChatService = field(default_factory=lambda: ChatService(EnginePool(allow_local=not on_space())))
    sessions: SessionRegistry = field(default_factory=SessionRegistry)

    def models(self) -> list[str]:
        """Models to offer; any hub id or folder may be typed as well."""
        return list(embedded_models())
