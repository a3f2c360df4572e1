"""The chat tab's events: from components' values to the page, drawn as component updates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from core.errors import FuseboxError
from engines.methods import BASELINE
from engines.sessions import Session
from ui import chat_handlers as handlers
from ui import texts
from ui.chat_handlers import ChatPage, ChatSettings
from ui.services import Services
from ui.technique_form import TechniqueControls, method_from_values

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
_RESULTS = 4  # table, report, diff, figure


def draw(page: ChatPage) -> list[Any]:
    """Values for heads, chats, results and the two buttons; results are left as they are until the page is finished."""
    shown = [*page.heads(), page.baseline.messages(), page.fused.messages()]
    if not page.finished:
        return [*shown, *[gr.skip()] * _RESULTS, gr.Button(interactive=False), gr.Button(interactive=True)]
    figure = gr.skip() if page.figure is None else gr.Plot(page.figure, visible=True)
    return [*shown, page.table, page.report, page.diff, figure, gr.Button(interactive=True), gr.Button(interactive=False)]


class ChatEvents:
    """Handlers of one tab. A visitor's conversation is found by the session of the request, never kept in the page."""

    def __init__(self, services: Services, controls: list[TechniqueControls]) -> None:
        self.services, self.controls = services, controls

    def session(self, request: gr.Request) -> Session:
        """The visitor's session."""
        return self.services.sessions.get(str(request.session_hash))

    def read(self, values: tuple[Any, ...]) -> ChatSettings:
        """The form's values, in the order the tab lists its inputs.

        Raises:
            InvalidRequest, IncompatibleTechniques: from the technique form.
        """
        model, system, dtype, at_once, score, *rest = values
        sampling, form = rest[: len(SAMPLING)], rest[len(SAMPLING) :]
        return ChatSettings(
            model_id=str(model or ""), method=method_from_values(self.controls, form), system=str(system or ""), dtype=str(dtype),
            at_once=bool(at_once), score=bool(score), sampling=dict(zip(SAMPLING, sampling, strict=True)),
        )

    def run(self, request: gr.Request, text: str, values: tuple[Any, ...]) -> Iterator[list[Any]]:
        """Ask both engines and draw as they answer; a form that cannot be read fails in the fused column."""
        session = self.session(request)
        try:
            settings = self.read(values)
        except FuseboxError as error:
            page = handlers.empty_page(session)
            page.fused.error, page.fused.status = str(error), "failed"
            yield draw(page)
            return
        yield from (draw(page) for page in handlers.ask(self.services, session, text, settings))

    def on_send(self, request: gr.Request, text: str, *values: Any) -> Iterator[list[Any]]:
        """Send was pressed: the question leaves the box once it is on its way."""
        box = gr.Textbox(value="") if isinstance(text, str) and text.strip() else gr.skip()
        for drawn in self.run(request, text, values):
            yield [box, *drawn]
            box = gr.skip()

    def on_regenerate(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Ask the last question again."""
        question = handlers.drop_last_turn(self.session(request))
        if question:
            yield from self.run(request, question, values)
        else:
            yield draw(handlers.empty_page(self.session(request)))

    def on_edit(self, request: gr.Request, event: gr.EditData, shown: list[Any], *values: Any) -> Iterator[list[Any]]:
        """A question was edited: what came after it goes, and it is asked anew."""
        index = event.index if isinstance(event.index, int) else event.index[0]
        handlers.cut_before_turn(self.session(request), sum(m["role"] == "user" for m in shown[:index]))
        yield from self.run(request, str(event.value), values)

    def on_undo(self, request: gr.Request) -> list[Any]:
        """Take the last turn back; its question returns to the box."""
        session = self.session(request)
        session.abandon()
        return [handlers.drop_last_turn(session), *draw(handlers.empty_page(session))]

    def on_clear(self, request: gr.Request) -> list[Any]:
        """Start a new conversation."""
        session = self.session(request)
        session.abandon()
        session.histories.clear()
        return draw(handlers.empty_page(session))

    def on_stop(self, request: gr.Request) -> None:
        """End the running answers at their next token."""
        self.session(request).halt()

    def on_done(self, request: gr.Request) -> tuple[Any, Any]:
        """Offer the finished comparison as files."""
        paths = handlers.export_files(self.services, self.session(request))
        json_file, csv_file = (gr.DownloadButton(value=path, interactive=path is not None) for path in paths)
        return json_file, csv_file

    def on_change(self, text: str, *values: Any) -> tuple[Any, ...]:
        """Something in the form changed: show the equal command and what the columns would run."""
        try:
            settings = self.read(values)
        except FuseboxError as error:
            return f"# {error}", gr.skip(), gr.skip()
        page = handlers.empty_page(Session(), settings.method)
        page.fused.status = texts.NOTHING_ON if settings.method == BASELINE else ""
        return handlers.equal_command(text, settings), *page.heads()

    def on_load(self, request: gr.Request, *values: Any) -> list[Any]:
        """A visitor came: an empty page."""
        return [*self.on_change("", *values), *draw(handlers.empty_page(self.session(request)))[2:4]]
