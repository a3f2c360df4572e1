"""The whole page: tabs, theme, endpoints, and what happens when a visitor leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from ui import texts
from ui.body_limit import BodyLimit
from ui.chat_api import register_chat_api
from ui.chat_tab import create_chat_tab
from ui.compare_api import register_compare_api
from ui.compare_tab import create_compare_tab
from ui.content_policy import ContentPolicy
from ui.services import Services

ASSETS = Path(__file__).resolve().parent.parent / "assets"
MAX_BODY_BYTES = 8 * 2**20
MAX_WAITING = 64


def build_app(services: Services | None = None) -> gr.Blocks:
    """The app, not yet listening. No model is loaded here: the first paint does not wait for one."""
    services = services or Services()
    with gr.Blocks(title=texts.TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as app:
        gr.HTML(f'<header class="masthead"><h1>{texts.TITLE}</h1><p>{texts.TAGLINE}</p></header>')
        comparison = gr.BrowserState(None, storage_key="fusebox-comparison")
        with gr.Tabs():
            with gr.Tab("Chat", id="chat"):
                create_chat_tab(services)
            with gr.Tab("Compare", id="compare"):
                create_compare_tab(services, comparison)
        register_chat_api(services)
        register_compare_api(services)

        def leave(request: gr.Request) -> None:
            services.leave(str(request.session_hash))

        app.unload(leave)
    app.queue(max_size=MAX_WAITING, api_open=False)
    return app


def launch_options() -> dict[str, Any]:
    """Arguments of `launch()`: look, and limits for strangers."""
    return {
        "theme": gr.themes.Soft(primary_hue="indigo", secondary_hue="slate", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        "css_paths": [ASSETS / "style.css", ASSETS / "comparison.css"],
        "app_kwargs": {"middleware": [BodyLimit.entry(MAX_BODY_BYTES), Middleware(ContentPolicy)]},
        "max_file_size": "5mb",
        "ssr_mode": False,
        "run_history": False,
        "show_error": True,
        "footer_links": ["api"],
        "quiet": False,
    }
