"""The native runtime as a technique: decode steps run in C, over whatever other techniques have made of the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from core.bundle import Bundle, storage_bytes, tensors_of
from core.reversible import Edits
from core.technique import SIMULATED_NOTE, Effect, Label, Prepared, Report, Stage, Technique
from engines.native.compiler import compile_program
from engines.native.decoder import NativeDecoder
from engines.native.parts import NotNative
from kernels.build import native
from kernels.kv_memory.cache import growing_cache
from optim.vattention.technique import reserved_cache

LONGEST = 32_768
"""Tokens that a program is compiled for at most: its tables of rotary positions grow with it."""


@dataclass(frozen=True)
class NativeRuntime(Technique):
    """Decode in C: one call a token over packed weights; the prompt is still read by torch.

    Source: this project (DESIGN.md, "Two executors"). Applied last: it compiles the model as the other techniques have left it,
    and executes what they only simulate or store: dropped activations are not multiplied, packed weights are read packed.
    Results differ from torch's by rounding. A model with a part that has no native counterpart, or a machine without a C compiler,
    decodes in torch as before; the report says why.
    """

    name: ClassVar[str] = "native"
    title: ClassVar[str] = "Native CPU runtime"
    summary: ClassVar[str] = "Decodes in compiled code, one call a token, over weights packed in the order they are read."
    effect: ClassVar[Effect] = Effect.LOSSLESS
    stage: ClassVar[Stage] = Stage.RUNTIME
    counter: ClassVar[str] = "native_steps"
    neutral_is_rounded: ClassVar[bool] = True

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        library = native()
        context = min(bundle.context_length, LONGEST)
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
        notes = (
            f"{len(compiled.program.program.operations)} operations a step on {compiled.program.threads} threads, context {context:,} tokens",
            "prompts are read by torch from the original weights; the packed copy of unquantised ones is counted in weights in use",
        )
        return Report(self.name, Label.EXECUTED, tuple(touched), {"prefill": "runs in torch"}, 0, cost, notes), ()
