"""Letting go of the weights that a program has packed copies of: the model's own layers then read the copies too."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from core.bundle import Bundle, StorageWatch, storage_bytes, tensors_of
from core.linear_layers import is_plain_linear
from core.memory import return_freed_memory
from core.reversible import Edits
from core.source_weights import SourceWeights
from core.technique import Applied
from core.units import format_bytes
from engines.native.compiler import Compiled
from kernels.packed_linear import PackedLinear

RELEASED_NOTE = "originals released:"
"""How the note about released bytes begins."""


def move_what_stays(model: nn.Module) -> None:
    """Copy every tensor that is no linear layer's out of the mapped file it was loaded from, which stays mapped as long as one of its tensors lives.

    For a model that nobody else uses: a compiled program knows tensors by their addresses.
    """
    for module in model.modules():
        if not is_plain_linear(module):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    tensor.data = tensor.data.clone()


def replaceable(bundle: Bundle, compiled: Compiled) -> Iterator[tuple[str, nn.Module]]:
    """Layers that hold weights which the program reads elsewhere: all it packed, but an output head that is the embedding as well."""
    table: Any = bundle.model.get_input_embeddings()
    for path, weight in compiled.read.items():
        layer = bundle.model.get_submodule(path)
        same = layer.weight_data is weight.data if isinstance(layer, PackedLinear) else layer.weight is table.weight
        if not same:
            yield path, layer


def replace_and_release(bundle: Bundle, compiled: Compiled, source: SourceWeights, edits: Edits) -> tuple[tuple[str, ...], int, str]:
    """Put layers that read the program's weights in the place of those with originals, and stop holding the originals.

    Returns:
        Paths, bytes of the layers replaced, and a note of what was released.
    """
    watch = StorageWatch(tensors_of(layer for _, layer in replaceable(bundle, compiled)))
    paths, before = read_packed(bundle, compiled, edits)
    edits.release(source.reader)
    return paths, before, released_note(watch, bundle, [edits])


def read_packed(bundle: Bundle, compiled: Compiled, edits: Edits) -> tuple[tuple[str, ...], int]:
    """Put layers that read the program's weights in the place of those with originals; their paths, and the originals' bytes."""
    replaced = tuple(replaceable(bundle, compiled))
    before = storage_bytes(tensors_of(layer for _, layer in replaced))
    for path, layer in replaced:
        edits.swap_module(bundle.model, path, PackedLinear.in_place_of(layer, compiled.read[path]))
    return tuple(path for path, _ in replaced), sum(before.values())


def released_note(watch: StorageWatch, bundle: Bundle, edits: Sequence[Edits]) -> str:
    """What of the watched weights has left memory and where the rest is, measured; those that the bundle still reads are no part of it."""
    gc.collect()
    return_freed_memory()
    released, in_use = watch.released_bytes(), storage_bytes(tensors_of([bundle.model]))
    idle = {place: size for place, size in watch.alive().items() if place not in in_use}
    undo = storage_bytes(tensors_of(module for e in edits for module in e.replaced))
    for_undo = sum(size for place, size in idle.items() if place in undo)
    elsewhere = sum(idle.values()) - for_undo
    words = [f"{RELEASED_NOTE} {format_bytes(released)} of {format_bytes(released + sum(idle.values()))}"]
    if for_undo:
        words.append(f"{format_bytes(for_undo)} stay for undo, since techniques made them and no file holds them")
    if elsewhere:
        words.append(f"{format_bytes(elsewhere)} are held by another engine of this model, or by whoever loaded it")
    return "; ".join(words)


def forget_originals(applied: Sequence[Applied], bundle: Bundle, watch: StorageWatch) -> None:
    """Give up undo, which engines do not use, so that weights which only undo would need leave memory. The last report says how much did."""
    for done in applied:
        watch.add(tensors_of(done.edits.replaced))
        done.edits.forget()
    report, note = applied[-1].report, released_note(watch, bundle, ())
    applied[-1].report = replace(report, notes=(*(n for n in report.notes if not n.startswith(RELEASED_NOTE)), note))
