"""`compare`: many queries, every method, files of all results; `figures`: draw them again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from engines.compare.events import CompareEvent

REPORT_FILE = "report.html"


def compare(
    quick: Annotated[bool, typer.Option("--quick", help="30 new tokens, one repeat.")] = False,
    methods: Annotated[list[str] | None, typer.Option(help="One or more methods or combinations a+b; every built one when not given. The baseline always runs.")] = None,
    queries: Annotated[Path | None, typer.Option(help="CSV, JSON or text file of questions; the five built-in ones when not given.")] = None,
    models: Annotated[list[str] | None, typer.Option(help="One or more: embedded, owner/name of the hub, or local folders. embedded when not given.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for cuda where there is one.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (the faster here), float32 or bfloat16.")] = "auto",
    repeats: Annotated[int | None, typer.Option(help="Times each answer is measured; 2, or 1 with --quick, when not given.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 keeps all tokens.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of every answer's random numbers.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder of all results; the same command goes on where it was cut off.")] = Path("comparison"),
    report: Annotated[bool, typer.Option("--report", help=f"Also write {REPORT_FILE}, one file that needs no network.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away the comparison that is in the folder.")] = False,
) -> None:
    """Ask many queries of many methods, one at a time, and write answers, metrics, tables and figures to a folder."""
    from engines.compare.query_files import read_queries
    from engines.compare.request import CompareRequest
    from engines.compare.service import CompareService
    from engines.device import check_device
    from engines.pool import EnginePool
    from engines.sampling import Sampling

    request = CompareRequest(
        read_queries(queries) if queries else (), tuple(methods or ()), tuple(models or ("embedded",)), repeats if repeats is not None else 1 if quick else 2,
        Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed), dtype, check_device(device), output, fresh, quick,
    )
    record = _watch(CompareService(EnginePool(device=check_device(device))).stream(request))
    print(_table(record))
    draw(record, output, report)
    print(f"written to {output}", file=sys.stderr)
    raise typer.Exit(0 if record["complete"] and not any(row["failed"] for row in record["rows"]) else 1)


def figures(folder: Annotated[Path, typer.Argument(help="A comparison's folder.")]) -> None:
    """Draw the figures of a comparison again, from its files."""
    from engines.compare.record import load_record

    for path in draw(load_record(folder), folder, report=False):
        print(path)


def draw(record: Mapping[str, Any], folder: Path, report: bool) -> list[Path]:
    """Write the figures, and the report where it is wanted; returns the files."""
    from engines.compare_figures import write_figures
    from engines.compare_report import write_report

    files: list[Path] = list(write_figures(record, folder))
    if report:
        write_report(record, folder / REPORT_FILE)
        files.append(folder / REPORT_FILE)
    return files


def _watch(events: Iterator[CompareEvent]) -> dict[str, Any]:
    """Tell the progress until the end, and return the record.

    Raises:
        InvalidRequest: the comparison as a whole failed.
    """
    from core.errors import InvalidRequest
    from core.units import format_time_left
    from engines.compare.events import CellDone, Failed, Finished, Progress

    terminal, told = sys.stderr.isatty(), -1
    try:
        for event in events:
            if isinstance(event, Progress):
                left = "" if event.seconds_left is None else f", {format_time_left(event.seconds_left)} left"
                if terminal:
                    print(f"\r{event.fraction:4.0%}{left} {event.text:<70.70}", end="", file=sys.stderr, flush=True)
                elif int(10 * event.fraction) > told:  # a log gets ten lines
                    told = int(10 * event.fraction)
                    print(f"{event.fraction:4.0%}{left} {event.text}", file=sys.stderr, flush=True)
            elif isinstance(event, CellDone) and event.cell["error"]:
                print(f"\r{event.cell['method']}, query {event.cell['query']}: {event.cell['error']}", file=sys.stderr)
            elif isinstance(event, Failed):
                raise InvalidRequest(event.words)
            elif isinstance(event, Finished):
                print(file=sys.stderr)
                return dict(event.record)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        events.close()  # type: ignore[attr-defined]
    raise InvalidRequest("The comparison ended without a result.")


_SHOWN = ("decode_tok_s", "ttft_s", "weights_in_use_bytes", "kv_in_use_bytes", "baseline_answer_bits_per_byte", "agreement_share", "keyword_recall")


def _table(record: Mapping[str, Any]) -> str:
    """Medians of the main figures, a line a method; a table a model."""
    from core.units import NOT_MEASURED
    from engines.metric_text import format_metric
    from engines.metrics import METRICS

    lines = []
    for model in (m["model_id"] for m in record["models"]):
        table = [[model, "label", *(METRICS[name]["title"] for name in _SHOWN)]]
        for row in (r for r in record["rows"] if r["model"] == model):
            figures = [format_metric(name, row["metrics"].get(name, {}).get("median")) for name in _SHOWN]
            table.append([row["method"], row["label"] or ("failed" if row["failed"] else NOT_MEASURED), *figures])
        widths = [max(len(line[place]) for line in table) for place in range(len(table[0]))]
        lines += ["", *("  ".join(cell.ljust(w) if place < 2 else cell.rjust(w) for place, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in table)]
    return "\n".join(lines)
