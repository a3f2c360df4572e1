"""The chat tab's events: from components' values to the page, drawn as component updates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from core.errors import FuseboxError
from engines.methods import BASELINE
from engines.sessions import Session, Turn
from ui import chat_handlers as handlers
from ui import texts
from ui.chat_handlers import ChatPage, ChatSettings
from ui.chat_view import status_line
from ui.safe_text import unshow_markdown
from ui.services import Services
from ui.technique_form import TechniqueControls, method_from_values

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
_RESULTS = 4  # table, report, diff, figure
_IDLE_BUTTONS = 3  # send, regenerate, undo: not while an answer runs


def draw(page: ChatPage) -> list[Any]:
    """Values for heads, chats, results and buttons; what has not changed is left as it is, results until the page is finished."""
    views = (page.baseline, page.fused)
    shown = [status_line(v) if v.changed else gr.skip() for v in views] + [v.messages() if v.changed else gr.skip() for v in views]
    for view in views:
        view.changed = False
    results = [page.table, page.report, page.diff, gr.Plot(page.figure, visible=page.figure is not None)] if page.finished else [gr.skip()] * _RESULTS
    idle = [gr.Button(interactive=page.finished)] * _IDLE_BUTTONS
    return [*shown, *results, *idle, gr.Button(interactive=not page.finished)]


class ChatEvents:
    """Handlers of one tab. A visitor's conversation is found by the session of the request, never kept in the page."""

    def __init__(self, services: Services, controls: list[TechniqueControls]) -> None:
        self.services, self.controls = services, controls

    def session(self, request: gr.Request) -> Session:
        """The visitor's session."""
        return self.services.sessions.get(str(request.session_hash))

    def read(self, values: tuple[Any, ...]) -> ChatSettings:
        """The form's values, in the order the tab lists its inputs.

        Techniques that cannot be applied leave the baseline alone, with the reason.
        """
        model, system, dtype, at_once, score, calibration, *rest = values
        sampling, form = rest[: len(SAMPLING)], rest[len(SAMPLING) :]
        method, form_error = BASELINE, None
        try:
            method = method_from_values(self.controls, form)
        except FuseboxError as error:
            form_error = str(error)
        return ChatSettings(
            model_id=str(model or ""), method=method, form_error=form_error, system=str(system or ""), dtype=str(dtype),
            at_once=bool(at_once), score=bool(score), calibration=str(calibration or "").strip(), sampling=dict(zip(SAMPLING, sampling, strict=True)),
        )

    def run(self, request: gr.Request, text: str, values: tuple[Any, ...]) -> Iterator[ChatPage]:
        """Ask both engines."""
        return handlers.ask(self.services, self.session(request), text, self.read(values))

    def on_send(self, request: gr.Request, text: str, *values: Any) -> Iterator[list[Any]]:
        """Send was pressed: the question leaves the box once it is on its way."""
        emptied = False
        for page in self.run(request, text, values):
            leaves, emptied = page.asked and not emptied, emptied or page.asked
            yield [gr.Textbox(value="") if leaves else gr.skip(), *draw(page)]

    def _ask_anew(self, request: gr.Request, question: str, values: tuple[Any, ...], before: dict[str, list[Turn]]) -> Iterator[list[Any]]:
        """Ask a question whose turn was taken away; when it cannot be answered the turns come back."""
        session = self.session(request)
        asked = session.asked
        for page in self.run(request, question, values):
            yield draw(page)
        newest = session.last_turn()
        if newest is None or newest.number <= asked:  # no column answered
            session.turns = before

    def on_regenerate(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Ask the last question again."""
        session = self.session(request)
        before = session.snapshot()
        question = handlers.drop_last_turn(session)
        if question:
            yield from self._ask_anew(request, question, values, before)
        else:
            yield draw(handlers.empty_page(session))

    def on_edit(self, request: gr.Request, event: gr.EditData, shown: list[Any], column: str, *values: Any) -> Iterator[list[Any]]:
        """A question was edited: what came after it goes, and it is asked anew."""
        session = self.session(request)
        before = session.snapshot()
        index = event.index if isinstance(event.index, int) else event.index[0]
        handlers.cut_before_turn(session, column, sum(m["role"] == "user" for m in shown[:index]))
        yield from self._ask_anew(request, unshow_markdown(str(event.value)), values, before)

    def on_undo(self, request: gr.Request) -> list[Any]:
        """Take the last turn back; its question returns to the box."""
        session = self.session(request)
        session.abandon()
        return [handlers.drop_last_turn(session), *draw(handlers.empty_page(session))]

    def on_clear(self, request: gr.Request) -> list[Any]:
        """Start a new conversation."""
        session = self.session(request)
        session.abandon()
        session.turns.clear()
        session.record = None
        return draw(handlers.empty_page(session))

    def on_stop(self, request: gr.Request) -> None:
        """End the running answers at their next token."""
        self.session(request).halt()

    def on_done(self, request: gr.Request) -> tuple[Any, Any]:
        """Offer the finished comparison as files."""
        paths = handlers.export_files(self.services, self.session(request))
        json_file, csv_file = (gr.DownloadButton(value=path, interactive=path is not None) for path in paths)
        return json_file, csv_file

    def on_unload(self) -> str:
        """Drop every loaded engine; running answers finish on what they hold."""
        count = self.services.chat.pool.unload()
        return f"{count} engines unloaded; the next question loads what it needs."

    def command(self, text: str, *values: Any) -> str:
        """The command that asks the same, or why there is none."""
        settings = self.read(values)
        return f"# {settings.form_error}" if settings.form_error else handlers.equal_command(text, settings)

    def on_change(self, text: str, *values: Any) -> tuple[Any, ...]:
        """The form changed: show the equal command and what the columns would run."""
        settings = self.read(values)
        page = handlers.empty_page(Session(), settings.method)
        page.fused.status = texts.NOTHING_ON if settings.method == BASELINE else ""
        return self.command(text, *values), *page.heads()

    def on_load(self, request: gr.Request, *values: Any) -> list[Any]:
        """A visitor came: an empty page."""
        return [*self.on_change("", *values), *draw(handlers.empty_page(self.session(request)))[2:4]]
