"""What the chat tab does when somebody acts on it. Functions of values; no components are made here."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.errors import FuseboxError
from engines.chat import ChatRequest, collect, result_of
from engines.export import chat_record, to_csv, to_json, write_text
from engines.figures import token_latency_figure
from engines.methods import BASELINE
from engines.sampling import Sampling, sampling_from
from engines.sessions import Session
from ui import texts
from ui.answer_diff import answer_diff
from ui.chat_view import ColumnView, paced, status_line
from ui.metrics_table import metrics_table
from ui.report_view import report_view
from ui.services import Services

FUSED = "fused"


@dataclass(frozen=True)
class ChatSettings:
    """The form's values for one request."""

    model_id: str
    method: str
    system: str
    dtype: str
    at_once: bool
    score: bool
    sampling: Mapping[str, Any]


@dataclass
class ChatPage:
    """Everything the page shows of a chat at one moment."""

    baseline: ColumnView
    fused: ColumnView
    table: str = ""
    report: str = ""
    diff: str = ""
    figure: Any = None
    finished: bool = False

    def heads(self) -> tuple[str, str]:
        """Both status lines."""
        return status_line(self.baseline), status_line(self.fused)


def _fused_title(method: str) -> str:
    return "Fused engine" if method == BASELINE else method.replace("+", " + ")


def empty_page(session: Session, method: str = BASELINE) -> ChatPage:
    """The page between two questions."""
    return ChatPage(
        ColumnView("Baseline", session.histories.get(BASELINE, [])),
        ColumnView(_fused_title(method), session.histories.get(FUSED, [])),
        table=metrics_table(None, None, ""),
        finished=True,
    )


def _request(session: Session, message: str, settings: ChatSettings, sampling: Sampling) -> ChatRequest:
    fused = settings.method
    methods = (BASELINE,) if fused == BASELINE else (BASELINE, fused)
    histories = {BASELINE: session.histories.get(BASELINE, []), fused: session.histories.get(FUSED, [])}
    if fused == BASELINE:
        histories = {BASELINE: session.histories.get(BASELINE, [])}
    return ChatRequest(
        message=message, methods=methods, model_id=settings.model_id, dtype=settings.dtype, system=settings.system, sampling=sampling,
        histories=histories, reverse=session.turns % 2 == 1, at_once=settings.at_once, score=settings.score,
    )


def ask(services: Services, session: Session, message: str, settings: ChatSettings) -> Iterator[ChatPage]:
    """Ask both engines; yields the page at most 30 times a second, the last time finished.

    Errors of the request as a whole are shown in both columns; the conversation stays as it was.
    """
    page = empty_page(session, settings.method)
    page.finished = False
    page.baseline.question = message if isinstance(message, str) and message.strip() else None
    if settings.method == BASELINE:
        page.fused.status = texts.NOTHING_ON
    else:
        page.fused.question = page.baseline.question
    try:
        request = _request(session, message, settings, sampling_from(dict(settings.sampling)))
        stop = session.begin()
        events = services.chat.stream(request, stop)
    except FuseboxError as error:
        for view in (page.baseline, page.fused):
            view.error, view.status = str(error), "failed"
        page.finished = True
        yield page
        return
    views = {BASELINE: page.baseline}
    if settings.method != BASELINE:
        views[settings.method] = page.fused
    session.turns += 1
    for last in paced(events, views):
        if last and session.stop is stop:  # else the visitor has cleared or asked anew meanwhile
            _finish(services, page, request, session)
        yield page


def _finish(services: Services, page: ChatPage, request: ChatRequest, session: Session) -> None:
    answers = {view.answer.method: view.answer for view in (page.baseline, page.fused) if view.answer}
    for column, view in ((BASELINE, page.baseline), (FUSED, page.fused)):
        session.histories.setdefault(column, []).extend(view.finished_turn())
    base, fused = page.baseline.answer, page.fused.answer
    page.table = metrics_table(base.metrics if base else None, fused.metrics if fused else None, page.fused.title)
    choice = services.chat.pool.dtype_choice(request.model_id, revision=request.revision, dtype=request.dtype)
    page.report = report_view(fused.reports if fused else (), choice.reason if choice else None)
    page.diff = answer_diff(page.baseline.text, page.fused.text)
    page.figure = token_latency_figure({v.title: v.answer.gaps_s for v in (page.baseline, page.fused) if v.answer})
    errors = {v.title: v.error for v in (page.baseline, page.fused) if v.error}
    session.record = (request, answers, errors)
    page.finished = True


def drop_last_turn(session: Session) -> str:
    """Take the last question and its answers back; returns the question, empty when there was none."""
    question = ""
    for history in session.histories.values():
        for place in range(len(history) - 1, -1, -1):
            if history[place]["role"] == "user":
                question = question or history[place]["content"]
                del history[place:]
                break
    return question


def cut_before_turn(session: Session, turn: int) -> None:
    """Keep the first `turn` questions with their answers in every column."""
    for history in session.histories.values():
        starts = [i for i, m in enumerate(history) if m["role"] == "user"]
        if turn < len(starts):
            del history[starts[turn] :]


def export_files(services: Services, session: Session) -> tuple[str | None, str | None]:
    """Paths of the last comparison as JSON and CSV; None before the first."""
    if session.record is None:
        return None, None
    request, answers, errors = session.record
    folder = Path(tempfile.mkdtemp(prefix="fusebox-"))
    choice = services.chat.pool.dtype_choice(request.model_id, revision=request.revision, dtype=request.dtype)
    model = {"model_id": request.model_id, "baseline_dtype": None if choice is None else asdict(choice)}
    write_text(folder / "fusebox-chat.json", to_json(chat_record(request, answers, errors, model)))
    write_text(folder / "fusebox-chat.csv", to_csv(answers, errors))
    return str(folder / "fusebox-chat.json"), str(folder / "fusebox-chat.csv")


def equal_command(message: str, settings: ChatSettings) -> str:
    """The command that asks the same question of the same engines."""
    methods = [BASELINE] if settings.method == BASELINE else [BASELINE, settings.method]
    words = ["python", "cli.py", "chat", "--message", message or "...", "--methods", *methods]
    if settings.model_id != "embedded":
        words += ["--model", settings.model_id]
    if settings.system.strip():
        words += ["--system", settings.system.strip()]
    if settings.dtype != "auto":
        words += ["--dtype", settings.dtype]
    for name, value in settings.sampling.items():
        if value != Sampling.__dataclass_fields__[name].default and not isinstance(value, bool):
            words += ["--" + name.replace("_", "-"), f"{value:g}" if isinstance(value, float) else str(value)]
    if settings.at_once:
        words.append("--at-once")
    if not settings.score:
        words.append("--no-score")
    return shlex.join(words)


def chat_compare(services: Services, session: Session, request: ChatRequest) -> dict[str, Any]:
    """The API's comparison: for each method its text and metrics, or its error in words.

    Raises:
        FuseboxError: the request as a whole is unusable.
    """
    result = result_of(*collect(services.chat.stream(request, session.begin())))
    return {
        column: {"error": result.errors[column]} if column in result.errors else {"text": result.response[column], "metrics": dict(result.metrics[column])}
        for column in request.methods
    }
