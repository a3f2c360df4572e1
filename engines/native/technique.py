"""The native runtime as a technique: decode steps run in C, over whatever other techniques have made of the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from core.bundle import Bundle, storage_bytes, tensors_of
from core.cpu_features import multiplies_bf16
from core.reversible import Edits
from core.source_weights import SourceWeights
from core.technique import SIMULATED_NOTE, Effect, Label, Prepared, Report, Stage, Technique, option
from engines.native.compiler import compile_program
from engines.native.decoder import NativeDecoder
from engines.native.parts import NotNative
from engines.native.release import read_packed, replace_and_release
from kernels.build import native
from kernels.kv_memory.cache import growing_cache
from optim.vattention.technique import reserved_cache

_PURPOSE = "native with keep=drop"
LONGEST = 32_768
"""Tokens that a program is compiled for at most: its tables of rotary positions grow with it."""


@dataclass(frozen=True)
class NativeRuntime(Technique):
    """Decode in C: one call a token over packed weights; the prompt is still read by torch.

    Source: this project (DESIGN.md, "Two executors"). Applied last: it compiles the model as the other techniques have left it,
    and executes what they only simulate or store: dropped activations are not multiplied, packed weights are read packed.
    Results differ from torch's by rounding. A model with a part that has no native counterpart, or a machine without a C compiler,
    decodes in torch as before; the report says why.

    keep="drop" lets go of the weights that the program has packed copies of; torch then reads prompts from the copies. In an engine nothing
    is kept, since engines are never undone. Outside of one, undo reads them from the model's files again, bit for bit, and what other techniques
    have made of them, which no file holds, stays. A model without files is refused.
    """

    name: ClassVar[str] = "native"
    title: ClassVar[str] = "Native CPU runtime"
    summary: ClassVar[str] = "Decodes in compiled code, one call a token, over weights packed in the order they are read."
    effect: ClassVar[Effect] = Effect.LOSSLESS
    stage: ClassVar[Stage] = Stage.RUNTIME
    counter: ClassVar[str] = "native_steps"
    neutral_is_rounded: ClassVar[bool] = True

    keep: str = option("originals", "originals: undo at once; drop: weights that decode reads packed leave memory", choices=("originals", "drop"))

    @property
    def drops_originals(self) -> bool:
        """Whether `keep` says so."""
        return self.keep == "drop"

    def check(self, bundle: Bundle) -> None:
        """Refuses, with keep="drop", a model whose weights are in no file.

        Raises:
            UnsupportedModel: with the reason.
        """
        super().check(bundle)
        if self.drops_originals and bundle.info.source != "hub":  # the hub's files are looked up when they are needed: that may take a request
            SourceWeights(bundle.info, _PURPOSE)

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        library = native()
        context = min(bundle.context_length, LONGEST)
        source = SourceWeights(bundle.info, _PURPOSE) if self.drops_originals else None
        try:
            if library.library is None:
                raise NotNative(library.reason)
            compiled = compile_program(bundle.model, context, torch.get_num_threads())
        except NotNative as reason:
            edits.set_attr(bundle, "decoder", None)
            return Report(self.name, Label.SIMULATED, (), {"decode": str(reason)}, notes=(f"{SIMULATED_NOTE} decode runs in torch: {reason}",)), ()
        touched = ["decoder", "native_weights"]
        edits.set_attr(bundle, "decoder", NativeDecoder(compiled, library.library, context))
        edits.set_attr(bundle.model, "native_weights", compiled.weights)
        if not reserved_cache(bundle):
            edits.set_attr(bundle, "cache_factory", partial(growing_cache, compiled.layouts))
            touched.append("cache_factory")
        cost = sum(storage_bytes(tensors_of([compiled.weights])).values())
        before, read_from = 0, "prompts are read by torch from the original weights; the packed copy of unquantised ones is counted in weights in use"
        released: tuple[str, ...] = ()
        if source is not None:
            paths, before, note = replace_and_release(bundle, compiled, source, edits)
            touched.extend(paths)
            read_from, released = "prompts are read by torch from the packed weights", (note,)
        elif bundle.model.dtype == torch.bfloat16 and not multiplies_bf16(bundle.device.type):
            paths, before = read_packed(bundle, compiled, edits)
            touched.extend(paths)
            read_from = "prompts are multiplied in C from the packed weights: this CPU has no products of bfloat16, and torch's take several times as long"
        notes = (f"{len(compiled.program.program.operations)} operations a step on {compiled.program.threads} threads, context {context:,} tokens", read_from, *released)
        return Report(self.name, Label.EXECUTED, tuple(touched), {"prefill": "runs in torch"}, before, cost, notes), ()
