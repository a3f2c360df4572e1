"""The whole page: tabs, theme, endpoints, and what happens when a visitor leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from core.errors import FuseboxError
from engines.chat import ChatRequest, checked_methods
from engines.sampling import sampling_from
from ui import chat_handlers, texts
from ui.body_limit import BodyLimit
from ui.chat_tab import create_chat_tab
from ui.content_policy import ContentPolicy
from ui.services import Services

ASSETS = Path(__file__).resolve().parent.parent / "assets"
MAX_BODY_BYTES = 8 * 2**20
MAX_WAITING = 64


def _register_api(services: Services) -> None:
    def chat_compare(request: gr.Request, message: str, methods: list[str], max_new_tokens: int = 128, model: str = "embedded") -> dict[str, Any]:
        """Ask one question of several methods; returns text and metrics, or an error in words, for each."""
        try:
            sampling = sampling_from({"max_new_tokens": max_new_tokens})
            asked = ChatRequest(message=message, methods=checked_methods(methods), model_id=model, sampling=sampling)
            return chat_handlers.chat_compare(services, str(request.session_hash), asked)
        except FuseboxError as error:
            raise gr.Error(str(error)) from error

    gr.api(chat_compare, api_name="chat_compare", concurrency_limit=16, concurrency_id="chat")


def build_app(services: Services | None = None) -> gr.Blocks:
    """The app, not yet listening. No model is loaded here: the first paint does not wait for one."""
    services = services or Services()
    with gr.Blocks(title=texts.TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as app:
        gr.HTML(f'<header class="masthead"><h1>{texts.TITLE}</h1><p>{texts.TAGLINE}</p></header>')
        with gr.Tabs(), gr.Tab("Chat", id="chat"):
            create_chat_tab(services)
        _register_api(services)

        def leave(request: gr.Request) -> None:
            services.leave(str(request.session_hash))

        app.unload(leave)
    app.queue(max_size=MAX_WAITING, api_open=False)
    return app


def launch_options() -> dict[str, Any]:
    """Arguments of `launch()`: look, and limits for strangers."""
    return {
        "theme": gr.themes.Soft(primary_hue="indigo", secondary_hue="slate", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        "css_paths": [ASSETS / "style.css"],
        "app_kwargs": {"middleware": [BodyLimit.entry(MAX_BODY_BYTES), Middleware(ContentPolicy)]},
        "max_file_size": "5mb",
        "ssr_mode": False,
        "run_history": False,
        "show_error": True,
        "footer_links": ["api"],
        "quiet": False,
    }
