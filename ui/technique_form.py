"""Switches and options of techniques, built from the techniques' own field metadata."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from typing import Any, cast

import gradio as gr

from core.technique import Technique
from engines.catalog import TECHNIQUES
from engines.methods import make_technique, method_name


@dataclass(frozen=True)
class TechniqueControls:
    """The components of one technique: its switch, and one component an option."""

    technique: type[Technique]
    switch: gr.Checkbox
    options: dict[str, gr.components.Component]


def _option_component(name: str, field: Field[Any]) -> gr.components.Component:
    meta, default = field.metadata, cast(Any, field.default)
    label = name.replace("_", " ")
    elem_id = f"option-{name.replace('_', '-')}"
    if meta["choices"] is not None:
        return gr.Dropdown(list(meta["choices"]), value=default, label=label, info=meta["help"], elem_classes=elem_id)
    if isinstance(default, bool):
        return gr.Checkbox(default, label=label, info=meta["help"], elem_classes=elem_id)
    if meta["minimum"] is not None and meta["maximum"] is not None:
        return gr.Slider(meta["minimum"], meta["maximum"], value=default, step=meta["step"], label=label, info=meta["help"], elem_classes=elem_id)
    return gr.Textbox(str(default), label=label, info=meta["help"], elem_classes=elem_id)


def create_technique_form(switched_on: str) -> list[TechniqueControls]:
    """One card a technique, its options shown while it is on; `switched_on` names the one that is on at first."""
    controls = []
    for name, technique in TECHNIQUES.items():
        with gr.Group(elem_classes="technique-card"):
            switch = gr.Checkbox(name == switched_on, label=technique.title, info=technique.summary, elem_id=f"switch-{name}")
            with gr.Column(visible=name == switched_on, elem_classes="technique-options") as panel:
                options = {f.name: _option_component(f.name, f) for f in fields(technique)}
            switch.change(lambda on: gr.Column(visible=on), switch, panel, api_visibility="private", queue=False, show_progress="hidden")
        controls.append(TechniqueControls(technique, switch, options))
    return controls


def form_inputs(controls: list[TechniqueControls]) -> list[gr.components.Component]:
    """The components in the order `method_from_values` reads their values."""
    return [component for c in controls for component in (c.switch, *c.options.values())]


def method_from_values(controls: list[TechniqueControls], values: list[Any]) -> str:
    """The method that the form's values spell; `baseline` when no switch is on.

    Raises:
        InvalidRequest, IncompatibleTechniques: in words for the column.
    """
    chosen, rest = [], list(values)
    for control in controls:
        on = rest.pop(0)
        settings = {name: rest.pop(0) for name in control.options}
        if on:
            chosen.append(make_technique(control.technique.name, settings))
    return method_name(chosen)
