"""One question to several engines side by side: streaming, one after the other, each column's failure its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from core.errors import FuseboxError, InvalidRequest
from core.loading import locate
from core.progress import Progress, Stop
from engines.engine import Answer, Engine
from engines.failures import in_words
from engines.figures import token_latency_figure
from engines.gate import DeviceGate
from engines.methods import BASELINE
from engines.pool import AUTO, EnginePool, check_dtype
from engines.prompting import Message, clean_message, has_visible_text
from engines.quality import of_answer, of_text
from engines.result import Result
from engines.sampling import Sampling

log = logging.getLogger(__name__)

MAX_COLUMNS = 24
_TICK_S = 0.25


@dataclass(frozen=True)
class ChatRequest:
    """One question to one model under several methods.

    histories: column -> the conversation before this question; a column without one starts afresh.
    reverse: run the columns last to first, so that over turns no method always goes first.
    at_once: run them together; times are then marked as not comparable.
    calibration: text that techniques calibrate on; empty for the project's own.
    reuse: answers begin with what earlier prompts left in the KV memory, where a method keeps that; measurements turn it off.
    """

    message: str
    methods: tuple[str, ...]
    model_id: str = "embedded"
    revision: str | None = None
    dtype: str = AUTO
    system: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    histories: Mapping[str, Sequence[Message]] = field(default_factory=dict)
    reverse: bool = False
    at_once: bool = False
    score: bool = True
    calibration: str = ""
    reuse: bool = True


@dataclass(frozen=True)
class ColumnStatus:
    """A column waits, loads or is being scored; `text` says which."""

    column: str
    text: str


@dataclass(frozen=True)
class ColumnText:
    """A piece of a column's answer."""

    column: str
    text: str


@dataclass(frozen=True)
class ColumnDone:
    """A column's answer with its metrics; sent again when quality figures have been added."""

    column: str
    answer: Answer


@dataclass(frozen=True)
class ColumnFailed:
    """A column ended with an error in words; the other columns go on."""

    column: str
    message: str


@dataclass(frozen=True)
class Tick:
    """Nothing new for a moment; lets a consumer notice that nobody listens any more."""


ChatEvent = ColumnStatus | ColumnText | ColumnDone | ColumnFailed | Tick
Emit = Callable[[ChatEvent], None]


class ChatService:
    """Chats over a pool of engines; the gate lets one request at a time onto the device."""

    def __init__(self, pool: EnginePool, gate: DeviceGate | None = None) -> None:
        self.pool = pool
        self.gate = gate or DeviceGate()

    def stream(self, request: ChatRequest, stop: Stop | None = None) -> Iterator[ChatEvent]:
        """Events of all columns as they happen. Closing the iterator stops the engines at their next token.

        Raises:
            InvalidRequest: the request as a whole is unusable; a single bad column yields ColumnFailed instead.
        """
        checked = replace(
            request, message=clean_message(request.message), methods=checked_methods(request.methods), dtype=check_dtype(request.dtype),
            system="" if isinstance(request.system, str) and not has_visible_text(request.system) else clean_message(request.system),
        )
        return self._events(checked, stop or Stop())

    def _events(self, request: ChatRequest, stop: Stop) -> Iterator[ChatEvent]:
        events: queue.Queue[ChatEvent | None] = queue.Queue()

        def work() -> None:
            try:
                self._run(request, stop, events.put)
            except Exception as error:  # a consumer must hear of it
                for column in request.methods:
                    events.put(ColumnFailed(column, in_words(error)))
            finally:
                events.put(None)

        thread = threading.Thread(target=work, name="engine", daemon=True)
        thread.start()
        try:
            while (event := _next_event(events)) is not None:
                yield event
        finally:
            stop.request()
            thread.join()

    def _run(self, request: ChatRequest, stop: Stop, emit: Emit) -> None:
        columns = list(reversed(request.methods)) if request.reverse else list(request.methods)
        for column in columns:
            emit(ColumnStatus(column, "waiting"))
        done: dict[str, tuple[Engine, Answer]] = {}
        try:
            # A download takes minutes and no core: it does not keep others from the device.
            if not self.pool.holds(request.model_id, revision=request.revision, dtype=request.dtype):
                locate(request.model_id, request.revision, _progress_of(columns[0], stop, emit), self.pool.allow_local)
            with self.gate.hold(stop) as held:
                if not held:
                    raise InvalidRequest("Stopped while waiting for the engine.")
                self._answer_all(request, columns, stop, emit, done)
                if request.score and not stop.requested:
                    _add_quality(done, stop, emit)
        except FuseboxError as error:
            for column in columns:
                emit(ColumnFailed(column, str(error)))

    def _answer_all(self, request: ChatRequest, columns: Sequence[str], stop: Stop, emit: Emit, done: dict[str, tuple[Engine, Answer]]) -> None:
        if not request.at_once:
            for column in columns:
                self._answer_one(request, column, stop, emit, done)
            return
        threads = [threading.Thread(target=self._answer_one, args=(request, c, stop, emit, done), name=f"engine {c}") for c in columns]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _answer_one(self, request: ChatRequest, column: str, stop: Stop, emit: Emit, done: dict[str, tuple[Engine, Answer]]) -> None:
        if stop.requested:
            emit(ColumnFailed(column, "Stopped before this column began."))
            return
        try:
            engine = self.pool.get_method(column, request.model_id, revision=request.revision, dtype=request.dtype, calibration=request.calibration,
                                          progress=_progress_of(column, stop, emit))
            emit(ColumnStatus(column, "answering"))
            answer = engine.answer(_conversation(request, column), request.sampling, stop, lambda text: emit(ColumnText(column, text)), reuse=request.reuse)
        except Exception as error:  # a column's crash must not take the others with it
            emit(ColumnFailed(column, in_words(error)))
        else:
            if request.at_once and len(request.methods) > 1:
                answer = replace(answer, metrics=replace(answer.metrics, times_comparable=False, peak_rss_bytes=None))
            done[column] = (engine, answer)
            emit(ColumnDone(column, answer))


def _progress_of(column: str, stop: Stop, emit: Emit) -> Progress:
    """Progress shown in a column; loading ends there when Stop was pressed."""

    def report(fraction: float, text: str) -> None:
        if stop.requested:
            raise InvalidRequest("Stopped while the model was loading.")
        emit(ColumnStatus(column, text))

    return report


def _next_event(events: queue.Queue[ChatEvent | None]) -> ChatEvent | None:
    try:
        return events.get(timeout=_TICK_S)
    except queue.Empty:
        return Tick()


def checked_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """Method names without blanks and repeats; whether they exist is each column's own matter.

    Raises:
        InvalidRequest: no list of names, none, or too many.
    """
    if not isinstance(methods, (list, tuple)) or not all(isinstance(m, str) for m in methods):
        raise InvalidRequest('The methods must be a list of names, for example ["baseline", "bnb_int8"].')
    columns = tuple(dict.fromkeys(m.strip() for m in methods))
    if not columns:
        raise InvalidRequest("No method is chosen. Name at least one, for example baseline.")
    if len(columns) > MAX_COLUMNS:
        raise InvalidRequest(f"{len(columns)} methods are asked for; at most {MAX_COLUMNS} at once.")
    return columns


def _conversation(request: ChatRequest, column: str) -> list[Message]:
    opening: list[Message] = [{"role": "system", "content": request.system}] if request.system.strip() else []
    return [*opening, *request.histories.get(column, ()), {"role": "user", "content": request.message}]


def _add_quality(done: dict[str, tuple[Engine, Answer]], stop: Stop, emit: Emit) -> None:
    """Score the baseline's answer under every engine, and compare the answers; needs a baseline column."""
    if BASELINE not in done or not done[BASELINE][1].token_ids:
        return
    reference = done[BASELINE][1]
    for column, (engine, answer) in done.items():
        emit(ColumnStatus(column, "scoring"))
        try:
            quality = of_answer(engine, answer.prompt.ids, answer, reference, stop)
        except Exception:  # the answer stands, only its score is missing; the log has the trace
            log.exception("scoring %s failed", column)
            emit(ColumnDone(column, answer))
            continue
        if stop.requested:
            emit(ColumnDone(column, answer))
            return
        done[column] = (engine, replace(answer, metrics=replace(answer.metrics, **quality, **of_text(answer.text))))
        emit(ColumnDone(column, done[column][1]))


def collect(events: Iterator[ChatEvent]) -> tuple[dict[str, Answer], dict[str, str]]:
    """Run a stream to its end: answers by column, and errors by column."""
    answers: dict[str, Answer] = {}
    errors: dict[str, str] = {}
    for event in events:
        if isinstance(event, ColumnDone):
            answers[event.column] = event.answer
        elif isinstance(event, ColumnFailed):
            errors[event.column] = event.message
    return answers, errors


def result_of(answers: Mapping[str, Answer], errors: Mapping[str, str]) -> Result:
    """Answers as the plain result that the page, the command line and the API share."""
    return Result(
        response={column: a.text for column, a in answers.items()},
        metrics={column: asdict(a.metrics) for column, a in answers.items()},
        figures={"token_latency": token_latency_figure({column: a.gaps_s for column, a in answers.items()})},
        errors=dict(errors),
    )
