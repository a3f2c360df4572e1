"""The terminal's entry point: `python cli.py COMMAND --help`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the commands show their own
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer

from commands.chat import chat
from commands.compare import compare, figures
from commands.files import check_writable, read_text
from commands.several_values import SeveralValues
from core.errors import FuseboxError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Fusebox: switch LLM efficiency techniques on and off and measure them.")
train_app = typer.Typer(no_args_is_help=True, help="Make the embedded models.")
app.add_typer(train_app, name="train")
bench_app = typer.Typer(no_args_is_help=True, help="Measure a technique against its rivals.")
app.add_typer(bench_app, name="bench")
app.command(cls=SeveralValues)(chat)
app.command(cls=SeveralValues)(compare)
app.command()(figures)

def _show_progress(fraction: float, message: str) -> None:
    print(f"\r{fraction:4.0%} {message:<70}", end="", file=sys.stderr, flush=True)


@app.command()
def convert(source: Annotated[Path, typer.Argument(help="Folder with pytorch_model*.bin.")], output: Annotated[Path, typer.Argument(help="New folder.")]) -> None:
    """Turn a pickle checkpoint into safetensors on this machine, reading tensors only."""
    from core.convert import convert_checkpoint

    for path in convert_checkpoint(source, output):
        print(path)


@train_app.command()
def backbone(
    corpus: Annotated[Path, typer.Option(help="Folder of .jsonl or .jsonl.zst shards with a text field.")],
    output: Annotated[Path, typer.Option(help="Work folder; an interrupted run resumes from it.")] = Path("work/backbone"),
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = 7_500_000,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train the shared tokenizer and pretrain the backbone."""
    from engines.embedded.backbone import BackbonePlan, train_backbone

    report = train_backbone(corpus, output, BackbonePlan(tokens=tokens, seed=seed), progress=_show_progress)
    print(f"\n{report.steps} steps in {report.seconds:.0f} s, last loss {report.losses[-1][1]:.3f} nats per token; saved to {output}")


@train_app.command("chat")
def train_chat_command(
    backbone: Annotated[Path, typer.Option(help="Folder of the pretrained backbone.")] = Path("work/backbone"),
    output: Annotated[Path, typer.Option(help="Model folder to write.")] = Path("assets/models/chat"),
    work: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = Path("work/chat"),
    corpus: Annotated[Path | None, typer.Option(help="The backbone's corpus, mixed in against forgetting.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Tune the backbone on the project's instruction set into the embedded chat model."""
    from engines.embedded.chat_tuning import ChatPlan, train_chat

    report = train_chat(backbone, output, work, ChatPlan(seed=seed), corpus=corpus, progress=_show_progress)
    print(f"\n{report.steps} steps in {report.seconds:.0f} s, last loss {report.losses[-1][1]:.3f}; saved to {output}")


@train_app.command("classifier")
def train_classifier_command(
    model: Annotated[str, typer.Option(help="Language model to start from: embedded, owner/name of the hub, or a local folder.")] = "embedded",
    dataset: Annotated[str, typer.Option(help="embedded, a local folder with train and validation files, or a data set of the hub.")] = "embedded",
    output: Annotated[Path, typer.Option(help="Model folder to write.")] = Path("work/classifier"),
    work: Annotated[Path | None, typer.Option(help="Folder of the checkpoint that an interrupted run resumes from.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 6,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 3e-4,
    batch: Annotated[int, typer.Option(min=1)] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Train on at most so many examples.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Fine-tune a language model into a classifier of a labelled data set, and score it."""
    from core.classifier import load_classifier
    from core.labelled_data import load_labelled
    from engines.embedded.classifier_tuning import ClassifierPlan, save_classifier, tune_classifier, validate

    plan = ClassifierPlan(epochs=epochs, learning_rate=learning_rate, batch=batch, limit=limit, seed=seed)
    data = load_labelled(dataset)
    classifier = load_classifier(model, data.labels, progress=_show_progress)
    before = validate(classifier, data)
    report = tune_classifier(classifier, data, plan, checkpoint=work, progress=_show_progress)
    base = Path(model).name if Path(model).is_dir() else model
    scored = save_classifier(classifier, data, plan, report, output, base)
    low, high = scored.interval
    print(f"\n{scored.share:.1%} ({low:.1%} to {high:.1%}) of {scored.examples} right, {before.share:.1%} before training, chance {data.chance:.1%}; {report.steps} steps in {report.seconds:.0f} s; saved to {output}")


@train_app.command("evaluate-chat")
def evaluate_chat_command(
    model: Annotated[str, typer.Option(help="Model to evaluate.")] = "embedded",
    shared: Annotated[Path | None, typer.Option(help="Folder with corpus/, wikitext2/, tinystories/ for bits per byte.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most about this many topic questions.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Recompute the embedded chat model's card on questions that were kept out of training."""
    import json

    from core.files import write_text
    from core.provenance import provenance
    from engines.embedded.chat_evaluation import evaluate_chat
    from engines.export import to_json
    from engines.pool import EnginePool

    check_writable(json_path)
    engine = EnginePool().get(model)
    figures = {**evaluate_chat(engine, shared, limit=limit, progress=_show_progress), "model": model, "provenance": provenance()}
    if json_path is not None:
        write_text(json_path, to_json(figures))
    print("\n" + json.dumps({k: {n: v for n, v in figures[k].items() if n != "samples"} for k in figures if k not in ("model", "provenance")}, indent=1))


_Peers = Annotated[list[str] | None, typer.Option("--peers", help="Rivals to measure in turns with ours: llama.cpp, openvino, or one form as llama.cpp:Q8_0. They need requirements-peers.txt.")]


@bench_app.command("decode", cls=SeveralValues)
def bench_decode(
    shape: Annotated[list[str] | None, typer.Option(help="embedded, smollm2-135m, gpt2, opt-125m, tinyllama-1.1b or phi-2; again for more. embedded when not given.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method and its weights' dtype, as native+int8:bfloat16; again for more.")] = None,
    peers: _Peers = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache while decoding.")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one segment.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="ABBA rounds.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Decode speed of methods against transformers, on the embedded model or on shapes with random weights."""
    from engines.speed.decode import DEFAULT_METHODS, time_decode

    _bench(json_path, [partial(time_decode, name, tuple(method or DEFAULT_METHODS), tuple(peers or ()), context=context, tokens=tokens, rounds=rounds) for name in shape or ["embedded"]], ("method", "executor", "decode_tok_s", "bytes_per_token", "bandwidth_fraction", "speedup_vs_baseline", "speedup_vs_peer"))


@bench_app.command("prefill", cls=SeveralValues)
def bench_prefill(
    shape: Annotated[list[str] | None, typer.Option(help="As for decode.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="As for decode.")] = None,
    peers: _Peers = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 256,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Prefill speed, in chunks over the project's cache, against one forward call of transformers."""
    from engines.speed.prefill import DEFAULT_METHODS, time_prefill

    _bench(json_path, [partial(time_prefill, name, tuple(method or DEFAULT_METHODS), tuple(peers or ()), tokens=tokens) for name in shape or ["embedded"]], ("method", "executor", "prefill_tok_s", "speedup_vs_baseline", "speedup_vs_peer"))


@bench_app.command("kv")
def bench_kv(
    shape: Annotated[str, typer.Option(help="As for decode.")] = "smollm2-135m",
    context: Annotated[int, typer.Option(min=1, help="Tokens to reserve.")] = 32_768,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 1024,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens that a second chat's prompt has in common with the first one's.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Of steps over untouched and over committed pages, in turns.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Memory, waiting and sharing of the reserved KV cache, over decode steps of the native runtime."""
    from engines.speed.kv_cache import measure_kv

    _bench(json_path, [partial(measure_kv, shape, context=context, tokens=tokens, prefix=prefix, rounds=rounds)],
           ("rss_growth_before_use_bytes", "committed_bytes", "rss_growth_after_use_bytes", "waste_bytes", "copied_bytes", "waited_pages", "p99_over_p50", "warm_p99_over_p50", "second_prompt_speedup", "shared_bytes"))


@bench_app.command("kernels")
def bench_kernels(json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None) -> None:
    """Single products, dense and with chosen rows, in bytes a second."""
    from engines.speed.kernel_table import time_kernels

    _bench(json_path, [time_kernels], ("kind", "how", "seconds", "bytes_s", "speedup_vs_dense"))


def _bench(json_path: Path | None, runs: Sequence[Callable[..., dict[str, Any]]], columns: Sequence[str]) -> None:
    """Run, print the columns of all rows, and write everything where asked to, after each run: the next may use up the memory."""
    import datetime

    from core.files import write_text
    from core.provenance import provenance
    from engines.export import to_json

    check_writable(json_path)
    results: list[dict[str, Any]] = []
    for run in runs:
        result = run(progress=_show_progress)
        results.append(result)
        print("\n" + "  ".join(f"{name}" for name in columns) + (f"   [{result['shape']}]" if "shape" in result else ""))
        for row in result.get("rows", ()):
            print(f"{row['method']}: {row['error']}" if "error" in row else "  ".join(_cell(row.get(name)) for name in columns))
        if "error" in result:
            print(result["error"])
        if json_path is not None:
            write_text(json_path, to_json({"results": results, "date": datetime.date.today().isoformat(), "provenance": provenance()}))


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(one)}" for name, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


@bench_app.command("larosa")
def bench_larosa(
    model: Annotated[str, typer.Option(help="embedded, owner/name of the hub, or a local folder.")] = "embedded",
    sparsity: Annotated[list[float] | None, typer.Option(help="Shares of the blocks' weight bytes to leave out; 0 0.25 0.4 0.5 0.75 when not given.")] = None,
    more_sparsity: Annotated[list[float] | None, typer.Argument(help="Further sparsities, so that --sparsity takes several.", show_default=False)] = None,
    variant: Annotated[list[str] | None, typer.Option(help="A variant; give it again for more. All when not given.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file to score; held-out project text when not given.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text file to calibrate on; the project's own text when not given.")] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens to score.")] = 4096,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 8192,
    revision: Annotated[str | None, typer.Option(help="Hub commit, branch or tag.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    figure: Annotated[Path | None, typer.Option(help="Draw quality against bytes to this .png, .svg or .pdf file.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Quality against weight bytes of LaRoSA and its rivals."""
    import datetime

    from core.files import write_text
    from core.loading import load_bundle
    from core.provenance import provenance
    from engines.export import to_json
    from engines.larosa_sweep import SPARSITIES, held_out_project_texts, sweep
    from engines.static_figures import quality_against_bytes, save_figure
    from optim.larosa.technique import VARIANTS

    check_writable(json_path)
    check_writable(figure, "--figure")
    chosen = tuple(sorted({*(sparsity or ()), *(more_sparsity or ())})) or SPARSITIES
    texts = [read_text(text)] if text else held_out_project_texts()
    bundle = load_bundle(model, revision=revision, dtype=dtype, progress=_show_progress)
    data = sweep(
        bundle, texts, sparsities=chosen, variants=tuple(variant or VARIANTS), calibration=[read_text(calibration)] if calibration else None,
        tokens=tokens, calibration_tokens=calibration_tokens, progress=_show_progress,
    )
    data = {**data, "model": {"model_id": bundle.info.model_id if bundle.info.source != "local" else Path(model).name, "revision": bundle.info.revision, "dtype": dtype}, "text": text.name if text else "held-out project text",
            "calibration_text": calibration.name if calibration else "project text", "date": datetime.date.today().isoformat(), "provenance": provenance()}
    print(f"\n{'variant':<23}{'sparsity':>9}{'measured':>9}{'MiB/token':>10}{'bits/byte':>10}{'agreement':>10}")
    print(f"{'dense':<23}{'':>18}{data['dense']['bytes_per_token'] / 2**20:>10.2f}{data['dense']['bits_per_byte']:>10.4f}{1:>10.1%}")
    for row in data["rows"]:
        print(f"{row['variant']:<23}{row['sparsity']:>9.2f}{row['measured_sparsity'] or 0:>9.3f}{row['bytes_per_token'] / 2**20:>10.2f}"
              f"{row['bits_per_byte']:>10.4f}{row['agreement']:>10.1%}")
    for refused in data["refused"]:
        print(f"{refused['variant']} at {refused['sparsity']:g}: {refused['reason']}")
    if json_path is not None:
        write_text(json_path, to_json(data))
    if figure is not None:
        save_figure(quality_against_bytes(data, f"{data['model']['model_id']}, {data['dense']['tokens']} tokens of {data['text']}"), figure)


def main() -> None:
    """Run the command line; errors for people are printed without a trace."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        app()
    except FuseboxError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
