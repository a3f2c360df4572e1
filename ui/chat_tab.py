"""The Chat tab: one question, two engines, every number measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from engines.embedded.about import about_embedded_chat
from engines.methods import BASELINE
from engines.sampling import Sampling
from ui import chat_handlers as handlers
from ui import texts
from ui.chat_events import ChatEvents
from ui.chat_handlers import FUSED
from ui.services import Services, on_space
from ui.technique_form import create_technique_form, form_inputs

_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
FIRST_TECHNIQUE = "bnb_int8"


@dataclass(frozen=True)
class _Chats:
    baseline_head: gr.HTML
    fused_head: gr.HTML
    baseline_chat: gr.Chatbot
    fused_chat: gr.Chatbot
    send: gr.Button
    stop: gr.Button


@dataclass(frozen=True)
class _Results:
    table: gr.HTML
    report: gr.HTML
    diff: gr.HTML
    figure: gr.Plot


@dataclass(frozen=True)
class _Actions:
    regenerate: gr.Button
    undo: gr.Button
    clear: gr.Button
    json_file: gr.DownloadButton
    csv_file: gr.DownloadButton
    command: gr.Code
    unload: gr.Button
    unloaded: gr.Markdown


@dataclass(frozen=True)
class _Page:
    message: gr.Textbox
    chats: _Chats
    results: _Results
    actions: _Actions

    @property
    def outputs(self) -> list[gr.components.Component]:
        """The components a page is drawn into, in the order of `chat_events.draw`."""
        c, r = self.chats, self.results
        buttons = [c.send, self.actions.regenerate, self.actions.undo, c.stop]
        return [c.baseline_head, c.fused_head, c.baseline_chat, c.fused_chat, r.table, r.report, r.diff, r.figure, *buttons]


def _create_sampling() -> list[gr.components.Component]:
    default = Sampling()
    return [
        gr.Number(default.max_new_tokens, label="max new tokens", precision=None, elem_id="max-new-tokens"),
        gr.Slider(0, 2, value=default.temperature, step=0.05, label="temperature", info="0 always takes the likeliest token"),
        gr.Slider(0.05, 1, value=default.top_p, step=0.05, label="top p"),
        gr.Slider(0, 200, value=default.top_k, step=1, label="top k", info="0: all tokens"),
        gr.Slider(0.5, 2, value=default.repetition_penalty, step=0.05, label="repetition penalty"),
        gr.Number(default.seed, label="seed", precision=0),
    ]


def create_chat_tab(services: Services) -> None:
    """Lay out the tab and wire its events."""
    with gr.Row(elem_classes="chat-layout"):
        with gr.Column(scale=1, min_width=300, elem_classes="controls"):
            model = gr.Dropdown(
                services.models(), value=next(iter(services.models()), None), label="Model", allow_custom_value=True, elem_id="model",
                info=texts.MODEL_HELP_SPACE if on_space() else texts.MODEL_HELP,
            )
            if "embedded" in services.models():
                gr.HTML(f'<p class="about-model">{about_embedded_chat()}</p>', elem_id="about-model")
            gr.HTML('<h2 class="panel-title">Techniques of the fused engine</h2>')
            controls = create_technique_form(switched_on=FIRST_TECHNIQUE)
            with gr.Accordion("System prompt and sampling", open=False):
                system = gr.Textbox(label="system prompt", lines=2, placeholder="Optional")
                sampling = _create_sampling()
            with gr.Accordion("How to run", open=False):
                dtype = gr.Radio(["auto", "float32", "bfloat16"], value="auto", label="baseline's number format", info="auto: the faster of the two on this machine, timed at load")
                at_once = gr.Checkbox(False, label="run both at once", info=texts.AT_ONCE_HELP)
                score = gr.Checkbox(True, label="score quality after the answers", info=texts.SCORE_HELP)
                calibration = gr.Textbox(label="calibration text", info=texts.CALIBRATION_HELP, lines=2, max_lines=6, placeholder="The project's own text", elem_id="calibration")
        with gr.Column(scale=3, min_width=320, elem_classes="conversation"):
            chats, message = _create_conversation()
        with gr.Column(scale=3, min_width=320, elem_classes="results"):
            results, actions = _create_results()
    inputs = [model, system, dtype, at_once, score, calibration, *sampling, *form_inputs(controls)]
    _wire(ChatEvents(services, controls), _Page(message, chats, results, actions), inputs)


def _create_conversation() -> tuple[_Chats, gr.Textbox]:
    chat: dict[str, Any] = {"height": 400, "show_label": False, "feedback_options": None, "editable": "user", "buttons": ["copy"], "layout": "bubble",
                            "latex_delimiters": [], "group_consecutive_messages": False}
    with gr.Row(elem_classes="columns"):
        with gr.Column(min_width=280):
            baseline_head = gr.HTML(elem_id="baseline-head")
            baseline_chat = gr.Chatbot(elem_id="baseline-chat", label="Baseline", placeholder=texts.EMPTY_BASELINE, **chat)
        with gr.Column(min_width=280):
            fused_head = gr.HTML(elem_id="fused-head")
            fused_chat = gr.Chatbot(elem_id="fused-chat", label="Fused engine", placeholder=texts.EMPTY_FUSED, **chat)
    with gr.Row(elem_classes="composer"):
        message = gr.Textbox(placeholder=texts.MESSAGE_PLACEHOLDER, label="Your question", show_label=False, lines=1, max_lines=8, scale=6, elem_id="message", autofocus=True)
        send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="send")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, interactive=False, elem_id="stop")
    gr.Examples([[e] for e in texts.EXAMPLES], message, label="Try", api_visibility="private", cache_examples=False)
    return _Chats(baseline_head, fused_head, baseline_chat, fused_chat, send, stop), message


def _create_results() -> tuple[_Results, _Actions]:
    with gr.Row(elem_classes="small-buttons"):
        regenerate, undo, clear = (gr.Button(name, size="sm", min_width=90, elem_id=name.lower()) for name in ("Regenerate", "Undo", "Clear"))
        json_file = gr.DownloadButton("Export JSON", size="sm", min_width=90, interactive=False, elem_id="export-json")
        csv_file = gr.DownloadButton("Export CSV", size="sm", min_width=90, interactive=False, elem_id="export-csv")
    table = gr.HTML(handlers.metrics_table(None, None, ""), elem_id="metrics")
    report = gr.HTML(elem_id="report")
    figure = gr.Plot(label="Time of each token", show_label=False, visible=False, elem_id="latency")
    diff = gr.HTML(elem_id="diff")
    command = gr.Code(label="The same from a terminal", language="shell", interactive=False, elem_id="command", lines=1, wrap_lines=True)
    with gr.Row():
        unload = gr.Button("Unload models", size="sm", min_width=120, scale=0, elem_id="unload")
        unloaded = gr.Markdown()
    return _Results(table, report, diff, figure), _Actions(regenerate, undo, clear, json_file, csv_file, command, unload, unloaded)


def _wire(events: ChatEvents, page: _Page, inputs: list[Any]) -> None:
    chats, actions, message = page.chats, page.actions, page.message
    outputs, files = page.outputs, [page.actions.json_file, page.actions.csv_file]
    answering: dict[str, Any] = {"concurrency_limit": 16, "concurrency_id": "chat", "show_progress": "hidden", **_PRIVATE}
    quiet: dict[str, Any] = {"show_progress": "hidden", **_PRIVATE}
    answers = [
        gr.on([message.submit, chats.send.click], events.on_send, [message, *inputs], [message, *outputs], trigger_mode="once", **answering),
        actions.regenerate.click(events.on_regenerate, inputs, outputs, **answering),
    ]
    for column, chat in ((BASELINE, chats.baseline_chat), (FUSED, chats.fused_chat)):
        answers.append(chat.edit(events.on_edit, [chat, gr.State(column), *inputs], outputs, **answering))
    for answer in answers:
        answer.then(events.on_done, None, files, **quiet)
    chats.stop.click(events.on_stop, None, None, queue=False, **quiet)
    actions.undo.click(events.on_undo, None, [message, *outputs], cancels=answers, **quiet)
    for clear in (actions.clear.click, chats.baseline_chat.clear, chats.fused_chat.clear):
        clear(events.on_clear, None, outputs, cancels=answers, **quiet).then(events.on_done, None, files, **quiet)
    actions.unload.click(events.on_unload, None, actions.unloaded, **quiet)
    preview = [actions.command, chats.baseline_head, chats.fused_head]
    at_change: dict[str, Any] = {"queue": False, "trigger_mode": "always_last", **quiet}
    gr.on([c.change for c in inputs], events.on_change, [message, *inputs], preview, **at_change)
    message.change(events.command, [message, *inputs], actions.command, **at_change)
    root = gr.context.Context.root_block
    assert root is not None
    root.load(events.on_load, inputs, [*preview, chats.baseline_chat, chats.fused_chat], **quiet)
