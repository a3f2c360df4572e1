"""The Chat tab's public endpoint."""

from __future__ import annotations

from typing import Any

import gradio as gr

from core.errors import FuseboxError
from engines.chat import ChatRequest, checked_methods
from engines.sampling import sampling_from
from ui import chat_handlers
from ui.services import Services


def register_chat_api(services: Services) -> None:
    """Offer `/chat_compare`."""

    def chat_compare(request: gr.Request, message: str, methods: list[str], max_new_tokens: int = 128, model: str = "embedded") -> dict[str, Any]:
        """Ask one question of several methods; returns text and metrics, or an error in words, for each."""
        try:
            sampling = sampling_from({"max_new_tokens": max_new_tokens})
            asked = ChatRequest(message=message, methods=checked_methods(methods), model_id=model, sampling=sampling)
            return chat_handlers.chat_compare(services, str(request.session_hash), asked)
        except FuseboxError as error:
            raise gr.Error(str(error)) from error

    gr.api(chat_compare, api_name="chat_compare", concurrency_limit=16, concurrency_id="chat")
