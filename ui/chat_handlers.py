"""What the chat tab does when somebody acts on it. Functions of values; no components are made here."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from core.errors import FuseboxError
from core.files import write_text
from engines.chat import ChatRequest, collect, result_of
from engines.export import chat_record, to_csv, to_json
from engines.figures import token_latency_figure
from engines.methods import BASELINE
from engines.prompting import clean_message
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
    """The form's values for one request. `form_error`: why the techniques cannot be applied; `method` is the baseline then."""

    model_id: str
    method: str
    system: str
    dtype: str
    at_once: bool
    score: bool
    sampling: Mapping[str, Any]
    form_error: str | None = None
    calibration: str = ""


@dataclass
class ChatPage:
    """Everything the page shows of a chat at one moment. `asked`: the question is on its way."""

    baseline: ColumnView
    fused: ColumnView
    table: str = ""
    report: str = ""
    diff: str = ""
    figure: Any = None
    asked: bool = False
    finished: bool = False

    def heads(self) -> tuple[str, str]:
        """Both status lines."""
        return status_line(self.baseline), status_line(self.fused)


def _fused_title(method: str) -> str:
    return "Fused engine" if method == BASELINE else method.replace("+", " + ")


def empty_page(session: Session, method: str = BASELINE) -> ChatPage:
    """The page between two questions."""
    return ChatPage(
        ColumnView("Baseline", session.history(BASELINE)),
        ColumnView(_fused_title(method), session.history(FUSED)),
        table=metrics_table(None, None, ""),
        finished=True,
    )


def refused(session: Session, message: str, error: str, method: str = BASELINE) -> ChatPage:
    """The page of a question that could not be asked: nothing of it is kept, and the box keeps its text."""
    page = empty_page(session, method)
    for view in (page.baseline, page.fused):
        view.question = message if isinstance(message, str) and message.strip() else None
        view.error, view.status = error, "failed"
    return page


def _request(session: Session, message: str, settings: ChatSettings) -> ChatRequest:
    methods = (BASELINE,) if settings.method == BASELINE else (BASELINE, settings.method)
    histories = {m: session.history(BASELINE if m == BASELINE else FUSED) for m in methods}
    return ChatRequest(
        message=clean_message(message), methods=methods, model_id=settings.model_id, dtype=settings.dtype, system=settings.system,
        sampling=sampling_from(dict(settings.sampling)), histories=histories, reverse=session.asked % 2 == 1, at_once=settings.at_once,
        score=settings.score, calibration=settings.calibration,
    )


def ask(services: Services, session: Session, message: str, settings: ChatSettings) -> Iterator[ChatPage]:
    """Ask both engines; yields the page at most 12 times a second, the last time finished.

    A request that cannot be asked at all is refused in both columns; the conversation stays as it was.
    """
    try:
        request = _request(session, message, settings)
        stop = session.begin()
        events = services.chat.stream(request, stop)
    except FuseboxError as error:
        yield refused(session, message, str(error), settings.method)
        return
    session.asked += 1
    page = empty_page(session, settings.method)
    page.finished, page.asked = False, True
    page.baseline.question = request.message
    views = {BASELINE: page.baseline}
    if settings.method == BASELINE:
        page.fused.status, page.fused.error = ("", None) if settings.form_error is None else ("failed", settings.form_error)
        page.fused.note = None if settings.form_error else texts.NOTHING_ON
    else:
        page.fused.question = request.message
        views[settings.method] = page.fused
    number = session.asked
    for last in paced(events, views):
        if last and session.stop is stop:  # else the visitor has cleared or asked anew meanwhile
            _finish(services, page, request, session, number)
        yield page


def _finish(services: Services, page: ChatPage, request: ChatRequest, session: Session, number: int) -> None:
    answers = {view.answer.method: view.answer for view in (page.baseline, page.fused) if view.answer}
    for column, view in ((BASELINE, page.baseline), (FUSED, page.fused)):
        turn = view.finished_turn(number)
        if turn is not None:
            session.turns.setdefault(column, []).append(turn)
    base, fused = page.baseline.answer, page.fused.answer
    page.table = metrics_table(base.metrics if base else None, fused.metrics if fused else None, page.fused.title)
    choice = services.chat.pool.dtype_choice(request.model_id, revision=request.revision, dtype=request.dtype)
    page.report = report_view(fused.reports if fused else (), choice.reason if choice else None)
    page.diff = answer_diff(page.baseline.text, page.fused.text)
    page.figure = token_latency_figure({v.title: v.answer.gaps_s for v in (page.baseline, page.fused) if v.answer}) if answers else None
    session.record = (request, answers, {v.title: v.error for v in (page.baseline, page.fused) if v.error})
    page.finished = True


def drop_last_turn(session: Session) -> str:
    """Take the last question and its answers back; returns the question, empty when there was none."""
    last = session.last_turn()
    if last is None:
        return ""
    session.drop_from(last.number)
    return last.question


def cut_before_turn(session: Session, column: str, place: int) -> None:
    """Forget the `place`-th shown turn of a column and all after it, in every column."""
    turns = session.turns.get(column, [])
    if place < len(turns):
        session.drop_from(turns[place].number)


def export_files(services: Services, session: Session) -> tuple[str | None, str | None]:
    """Paths of the last comparison as JSON and CSV; None before the first."""
    if session.record is None:
        return None, None
    request, answers, errors = session.record
    if session.folder is None:
        session.folder = TemporaryDirectory(prefix="fusebox-")
    choice = services.chat.pool.dtype_choice(request.model_id, revision=request.revision, dtype=request.dtype)
    json_path, csv_path = (Path(session.folder.name) / f"fusebox-chat.{kind}" for kind in ("json", "csv"))
    write_text(json_path, to_json(chat_record(request, answers, errors, choice)))
    write_text(csv_path, to_csv(answers, errors))
    return str(json_path), str(csv_path)


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
    if settings.calibration:
        words += ["--calibration", "calibration.txt"]
    if settings.at_once:
        words.append("--at-once")
    if not settings.score:
        words.append("--no-score")
    return shlex.join(words)


def chat_compare(services: Services, visitor: str, request: ChatRequest) -> dict[str, Any]:
    """The API's comparison: for each method its text and metrics, or its error in words.

    Raises:
        FuseboxError: the request as a whole is unusable.
    """
    with services.visitor_stop(visitor) as stop:
        result = result_of(*collect(services.chat.stream(request, stop)))
    return {
        column: {"error": result.errors[column]} if column in result.errors else {"text": result.response[column], "metrics": dict(result.metrics[column])}
        for column in dict.fromkeys(m.strip() for m in request.methods)
    }
