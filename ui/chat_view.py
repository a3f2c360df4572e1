"""What a chat shows while it runs: the state of both columns, and the component updates that show it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from engines.chat import ChatEvent, ColumnDone, ColumnFailed, ColumnStatus, ColumnText, Tick
from engines.engine import Answer
from engines.prompting import Message
from engines.sessions import Turn
from ui.safe_text import show_html, show_markdown

UPDATES_PER_S = 12.0  # more only keeps the browser from painting
IDLE_UPDATES_PER_S = 4.0


@dataclass
class ColumnView:
    """One column: the conversation before this question, and what came of the answer so far.

    `changed`: something is to be drawn since `changed` was last cleared.
    """

    title: str
    history: Sequence[Message]
    question: str | None = None
    pieces: list[str] = field(default_factory=list)
    status: str = ""
    error: str | None = None
    note: str | None = None
    answer: Answer | None = None
    changed: bool = True

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.pieces)

    def apply(self, event: ChatEvent) -> None:
        """Take in one event of this column."""
        self.changed = True
        if isinstance(event, ColumnText):
            self.pieces.append(event.text)
        elif isinstance(event, ColumnStatus):
            self.status = event.text
        elif isinstance(event, ColumnDone):
            self.answer, self.status = event.answer, "done"
        elif isinstance(event, ColumnFailed):
            self.error, self.status = event.message, "failed"

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as the chat component takes it."""
        shown: list[dict[str, Any]] = [{"role": m["role"], "content": show_markdown(m["content"])} for m in self.history]
        if self.question is not None:
            shown.append({"role": "user", "content": show_markdown(self.question)})
        if self.text:
            shown.append({"role": "assistant", "content": show_markdown(self.text)})
        if self.note:
            shown.append({"role": "assistant", "content": f"*{self.note}*"})
        if self.error:
            shown.append({"role": "assistant", "content": f"**Not answered.** {show_markdown(self.error)}"})
        return shown

    def finished_turn(self, number: int) -> Turn | None:
        """The turn to keep; None for a failed column."""
        return None if self.question is None or self.answer is None else Turn(number, self.question, self.text)


def status_line(view: ColumnView) -> str:
    """A column's heading and what it does now, as HTML."""
    working = view.status in ("answering", "scoring") or view.status.startswith(("reading", "applying", "timing", "downloaded"))
    state = "working" if working else view.status or "ready"
    text = {"": "ready", "waiting": "waits for its turn", "done": _done_text(view), "failed": "failed"}.get(view.status, view.status)
    return f'<div class="column-head" data-state="{show_html(state)}"><strong>{show_html(view.title)}</strong><span aria-live="polite">{show_html(text)}</span></div>'


def _done_text(view: ColumnView) -> str:
    if view.answer is None:
        return "done"
    metrics = view.answer.metrics
    speed = f", {metrics.decode_tok_s:.1f} tok/s" if metrics.decode_tok_s and metrics.times_comparable else ""
    stopped = "stopped, " if metrics.finish_reason == "stopped" else ""
    return f"{stopped}{metrics.output_tokens} tokens{speed}"


def paced(events: Iterator[ChatEvent], views: dict[str, ColumnView]) -> Iterator[bool]:
    """Feed events to their columns; yields when it is time to draw, True the last time. Never more than 12 a second.

    Closing this iterator closes the events, which stops the engines.
    """
    drawn = 0.0
    try:
        for event in events:
            if not isinstance(event, Tick):
                views[event.column].apply(event)
            now = time.monotonic()
            due = 1 / (IDLE_UPDATES_PER_S if isinstance(event, Tick) else UPDATES_PER_S)
            if now - drawn >= due or isinstance(event, (ColumnDone, ColumnFailed)):
                drawn = now
                yield False
        yield True
    finally:
        close = getattr(events, "close", None)
        if close is not None:
            close()
