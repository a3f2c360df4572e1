"""The Compare tab: many queries, every method, a table that fills, and the files to take away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from engines.compare.offer import describe_methods
from engines.compare.queries import built_in_queries
from engines.compare_figures import PAGE_FIGURES
from engines.methods import BASELINE
from engines.metrics import METRICS
from engines.pareto import Limits
from ui import texts
from ui.compare_events import CompareEvents
from ui.compare_form import BUILT_IN, OWN_FILE
from ui.compare_view import TABLE_METRICS, cell_table, query_preview, recommendation, status_line
from ui.services import Services, on_space

_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
FIRST_METHODS = ("native", "int8", "bnb_int8", "word_removal")
FIRST_COMBINATION = "native+int8"
_FIGURE_ORDER = ("pareto", *(name for name in PAGE_FIGURES if name != "pareto"))


@dataclass(frozen=True)
class _Form:
    inputs: list[Any]
    upload: gr.File
    queries: gr.State
    preview: gr.HTML
    source: gr.Radio
    built_in: gr.CheckboxGroup
    limits: list[Any]
    methods: gr.CheckboxGroup
    every: gr.Button


@dataclass(frozen=True)
class _Results:
    status: gr.HTML
    table: gr.HTML
    metric: gr.Dropdown
    model: gr.Dropdown
    query: gr.Dropdown
    answers: gr.HTML
    advice: gr.HTML
    figures: list[gr.Plot]
    tables: gr.HTML
    files: list[gr.DownloadButton]
    command: gr.Code


def create_compare_tab(services: Services, job_id: gr.BrowserState) -> None:
    """Lay out the tab and wire its events. job_id: names the visitor's last comparison; it must lie outside of the tabs, whose content is not there until shown."""
    with gr.Row(elem_classes="chat-layout compare-layout"):
        with gr.Column(scale=1, min_width=300, elem_classes="controls"):
            form = _create_form(services)
        with gr.Column(scale=3, min_width=320, elem_classes="conversation"):
            with gr.Row(elem_classes="composer"):
                run = gr.Button("Run", variant="primary", scale=1, min_width=90, elem_id="compare-run")
                stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, interactive=False, elem_id="compare-stop")
            results = _create_results()
    _wire(CompareEvents(services), job_id, form, results, run, stop)


def _create_form(services: Services) -> _Form:
    offered = [m for m in describe_methods() if m.name != BASELINE]
    models = gr.Dropdown(services.models(), value=services.models()[:1], multiselect=True, allow_custom_value=True, label="Models", elem_id="compare-models",
                         info=texts.MODEL_HELP_SPACE if on_space() else texts.MODEL_HELP)
    methods = gr.CheckboxGroup([(m.title, m.name) for m in offered], value=[m.name for m in offered if m.name in FIRST_METHODS], label="Methods",
                               info="The baseline always runs first, as the reference.", elem_id="compare-methods")
    every = gr.Button("All methods", size="sm", min_width=90, elem_id="compare-every")
    combinations = gr.Textbox(FIRST_COMBINATION, label="Combinations", info=texts.COMBINATIONS_HELP, lines=1, max_lines=6, elem_id="compare-combinations")
    source = gr.Radio([BUILT_IN, OWN_FILE], value=BUILT_IN, label="Queries", elem_id="compare-source")
    built_in = gr.CheckboxGroup([(_short(q.question), q.id) for q in built_in_queries()], value=[q.id for q in built_in_queries()], show_label=False, container=False, elem_id="compare-queries")
    with gr.Column(visible=False) as _own:
        upload = gr.File(label="CSV, JSON or text", file_types=[".csv", ".json", ".txt"], type="filepath", height=110, elem_id="compare-upload")
        preview = gr.HTML(query_preview(()), elem_id="compare-preview", elem_classes="comparison")
    queries = gr.State(())
    source.change(lambda chosen: (gr.Column(visible=chosen == OWN_FILE), gr.CheckboxGroup(visible=chosen == BUILT_IN)), source, [_own, built_in], queue=False, show_progress="hidden", **_PRIVATE)
    quick = gr.Checkbox(True, label="quick", info="At most 30 new tokens an answer.", elem_id="compare-quick")
    with gr.Accordion("How to measure", open=False):
        repeats = gr.Number(1, label="repeats", info="Each answer again, for the spread.", precision=0, elem_id="compare-repeats")
        dtype = gr.Radio(["auto", "float32", "bfloat16"], value="auto", label="number format", info="auto: the faster of the two on this machine, timed at load")
        tokens = gr.Number(128, label="max new tokens", precision=None, elem_id="compare-tokens")
        temperature = gr.Slider(0, 2, value=0.0, step=0.05, label="temperature", info="0 always takes the likeliest token")
        seed = gr.Number(0, label="seed", precision=0)
    with gr.Accordion("Your limits", open=False):
        limits = [
            gr.Number(None, label="memory, MiB at most", info="weights in use and committed KV cache", elem_id="limit-memory"),
            gr.Number(None, label="quality loss, bits per byte at most", info="of the baseline's answer, above the baseline's own", elem_id="limit-loss"),
            gr.Number(None, label="agreement, % at least", info="of tokens, before the answers part", elem_id="limit-agreement"),
            gr.Number(None, label="decode speed, tok/s at least", elem_id="limit-speed"),
        ]
    inputs = [models, methods, combinations, source, built_in, queries, quick, repeats, dtype, tokens, temperature, seed]
    return _Form(inputs, upload, queries, preview, source, built_in, limits, methods, every)


def _short(question: str) -> str:
    return question if len(question) <= 70 else f"{question[:67].rstrip()}…"


def _create_results() -> _Results:
    status = gr.HTML(status_line(None), elem_id="compare-status")
    with gr.Row():
        metric = gr.Dropdown([(METRICS[m]["title"], m) for m in TABLE_METRICS], value=TABLE_METRICS[0], label="Shown in the table", elem_id="compare-metric", min_width=200)
        model = gr.Dropdown([], label="Model shown", visible=False, elem_id="compare-model-shown", min_width=200)
    table = gr.HTML(cell_table(None, TABLE_METRICS[0]), elem_id="compare-table", elem_classes="comparison")
    advice = gr.HTML(recommendation({}, Limits(), None), elem_id="compare-advice", elem_classes="comparison")
    with gr.Row(elem_classes="small-buttons"):
        files = [gr.DownloadButton(name, size="sm", min_width=90, interactive=False, elem_id=f"compare-{name.split()[0].lower()}") for name in ("JSON", "CSV", "Figures (PNG)", "Report (HTML)")]
    query = gr.Dropdown([], label="Answers to", visible=False, elem_id="compare-query")
    answers = gr.HTML(f'<p class="empty-note">{texts.COMPARE_NO_ANSWERS}</p>', elem_id="compare-answers", elem_classes="comparison")
    with gr.Row(elem_classes="figure-grid"):
        figures = [gr.Plot(show_label=False, visible=False, elem_id=f"compare-figure-{name}") for name in _FIGURE_ORDER]
    with gr.Accordion("All figures as tables", open=False):
        tables = gr.HTML(elem_id="compare-tables", elem_classes="comparison")
    command = gr.Code(label="The same from a terminal", language="shell", interactive=False, elem_id="compare-command", lines=1, wrap_lines=True)
    in_order = [figures[_FIGURE_ORDER.index(name)] for name in PAGE_FIGURES]
    return _Results(status, table, metric, model, query, answers, advice, in_order, tables, files, command)


def _wire(events: CompareEvents, job_id: gr.BrowserState, form: _Form, shown: _Results, run: gr.Button, stop: gr.Button) -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", **_PRIVATE}
    at_change: dict[str, Any] = {"queue": False, "trigger_mode": "always_last", **quiet}
    looked_at = [job_id, shown.model, shown.metric, shown.query]
    page = [shown.status, shown.table, shown.answers, shown.model, shown.query, run, stop]
    result = ([job_id, shown.model, *form.limits], [shown.advice, shown.tables, *shown.figures])
    running = run.click(events.on_run, [*looked_at, *form.inputs], [job_id, *page], concurrency_limit=8, concurrency_id="compare", trigger_mode="once", **quiet)
    running.then(events.on_result, *result, **quiet).then(events.on_files, job_id, shown.files, concurrency_limit=1, concurrency_id="pictures", **quiet)
    stop.click(events.on_stop, job_id, None, queue=False, **quiet)
    shown.metric.input(events.on_view, [job_id, shown.model, shown.metric], shown.table, **at_change)
    shown.model.input(events.on_view, [job_id, shown.model, shown.metric], shown.table, **at_change).then(
        events.on_query, [job_id, shown.model, shown.query], shown.answers, **quiet).then(events.on_result, *result, **quiet)
    shown.query.input(events.on_query, [job_id, shown.model, shown.query], shown.answers, **at_change)
    gr.on([field.change for field in form.limits], events.on_limits, [job_id, shown.model, *form.limits], shown.advice, **at_change)
    gr.on([form.upload.upload, form.upload.clear], events.on_upload, form.upload, [form.queries, form.preview, form.source, form.upload], **quiet)
    form.every.click(lambda: [value for _, value in form.methods.choices], None, form.methods, queue=False, **quiet)
    gr.on([field.change for field in form.inputs], events.on_form, form.inputs, shown.command, **at_change)
    root = gr.context.Context.root_block
    assert root is not None
    root.load(events.on_load, [*looked_at, *form.inputs], [*page, shown.command], **quiet).then(events.on_result, *result, **quiet).then(events.on_files, job_id, shown.files, **quiet)
