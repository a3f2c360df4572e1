"""`chat`: one question, several methods, side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commands.files import check_writable, make_folder, read_text

if TYPE_CHECKING:
    from engines.chat import ChatEvent, ChatRequest, ChatService

QUICK_TOKENS = 30
RESULT_FILE = "comprehensive_results.json"


def chat(
    message: Annotated[str, typer.Option(help="The question.")],
    methods: Annotated[list[str] | None, typer.Option(help="One or more: baseline, technique names, combinations such as bnb_int8+word_removal:every=4, all_combined; all for every one.")] = None,
    model: Annotated[str, typer.Option(help="embedded, owner/name of the hub, or a local folder.")] = "embedded",
    revision: Annotated[str | None, typer.Option(help="Hub commit, branch or tag.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the faster here), float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for cuda where there is one.")] = "cpu",
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 keeps all tokens.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of this request's random numbers.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help=f"{QUICK_TOKENS} new tokens.")] = False,
    at_once: Annotated[bool, typer.Option("--at-once", help="Run all methods at the same time; times are then not comparable.")] = False,
    score: Annotated[bool, typer.Option("--score/--no-score", help="Score the baseline's answer under each method.")] = True,
    calibration: Annotated[Path | None, typer.Option(help="Text file that techniques calibrate on; the project's own text when not given.")] = None,
    output: Annotated[Path | None, typer.Option(help=f"Folder to write {RESULT_FILE} to.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """Ask one question of several methods and print answers and metrics side by side."""
    from engines.chat import ChatRequest, ChatService
    from engines.device import check_device
    from engines.methods import BASELINE, expand_all
    from engines.pool import EnginePool
    from engines.sampling import Sampling

    check_writable(json_path)
    sampling = Sampling(QUICK_TOKENS if quick else max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    request = ChatRequest(message=message, methods=expand_all(methods or (BASELINE,)), model_id=model, revision=revision, dtype=dtype, system=system, sampling=sampling,
                          at_once=at_once, score=score, calibration=read_text(calibration) if calibration else "")
    service = ChatService(EnginePool(device=check_device(device)))
    make_folder(output)
    failed = _run(service, request, [p for p in (json_path, output / RESULT_FILE if output else None) if p])
    raise typer.Exit(1 if failed else 0)


def _run(service: ChatService, request: ChatRequest, files: list[Path]) -> bool:
    """Stream a comparison to the terminal and write it to files; True when a column failed."""
    from core.files import write_text
    from engines.chat import collect
    from engines.export import chat_record, to_json
    from engines.metric_text import metrics_text

    answers, errors = collect(_watched(service, request))
    for column, answer in answers.items():
        print(f"\n--- {column}\n{answer.text.strip()}")
    for column, text in errors.items():
        print(f"\n--- {column}\nerror: {text}")
    print("\n" + metrics_text({column: a.metrics for column, a in answers.items()}))
    choice = service.pool.dtype_choice(request.model_id, revision=request.revision, dtype=request.dtype)
    if choice is not None:
        print(f"baseline: {choice.reason}")
    for answer in answers.values():
        for report in answer.reports:
            print(f"{report.technique}: {report.label.value}; {'; '.join(report.notes)}")
    for path in files:
        write_text(path, to_json({**chat_record(request, answers, errors, choice), "methods": _methods(service, request, list(answers))}))
        print(f"written to {path}", file=sys.stderr)
    return bool(errors)


def _watched(service: ChatService, request: ChatRequest) -> Iterator[ChatEvent]:
    """The service's events, each column's state told on the way."""
    from engines.chat import ColumnStatus, Tick

    for event in service.stream(request):
        if isinstance(event, ColumnStatus):
            print(f"[{event.column}] {event.text}", file=sys.stderr)
        if not isinstance(event, Tick):
            yield event


def _methods(service: ChatService, request: ChatRequest, columns: list[str]) -> list[dict[str, Any]]:
    """What the columns that answered stand for on this model."""
    from engines.methods import method_entry

    base = service.pool.get(request.model_id, revision=request.revision, dtype=request.dtype).bundle if columns else None
    return [method_entry(column, base) for column in columns]
