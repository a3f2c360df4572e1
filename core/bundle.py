"""What an engine runs: a model, its tokenizer, filters of the prompt, and the maker of its KV cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from core.reversible import Edits


class PromptFilter(Protocol):
    """Rewrites what the user said before it is tokenised; deterministic, so that history stays the same."""

    def __call__(self, text: str) -> str:
        """The text that the model gets."""


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from. `dtype` is the dtype its weights were loaded in."""

    model_id: str
    revision: str | None
    dtype: str
    source: str  # embedded | local | hub


@dataclass
class Bundle:
    """The five slots a technique may change, through `core.reversible` only.

    model: a transformers causal LM in eval mode.
    tokenizer: its tokenizer.
    prompt_filters: applied in order to each user message.
    cache_factory: returns the empty KV cache of one request; transformers' DynamicCache for this model when not given.
    decoder: runs decode steps in place of the model, (tokens, cache) -> logits [tokens, vocab_size]; None: the model runs them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: ModelInfo
    prompt_filters: tuple[PromptFilter, ...] = ()
    cache_factory: Callable[[], Any] = field(default=None)  # type: ignore[assignment]
    decoder: Callable[[Sequence[int], Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.cache_factory is None:
            self.cache_factory = partial(DynamicCache, config=self.model.config)

    @property
    def device(self) -> torch.device:
        """The device the model's input goes to."""
        return next(self.model.get_input_embeddings().parameters()).device

    @property
    def context_length(self) -> int:
        """Positions the model was made for, prompt and answer together."""
        config = self.model.config.get_text_config()
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"):
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                return value
        return 2048

    def filter_prompt(self, text: str) -> str:
        """`text` after every prompt filter."""
        for prompt_filter in self.prompt_filters:
            text = prompt_filter(text)
        return text

    def clone(self) -> Bundle:
        """A bundle of its own modules over the same tensors: editing it leaves this one alone and costs no weights.

        A decoder is made for one set of modules and is not taken along.
        """
        tensors = (*self.model.parameters(), *self.model.buffers())
        memo: dict[int, Any] = {id(t): t for t in tensors}
        return Bundle(copy.deepcopy(self.model, memo), self.tokenizer, self.info, self.prompt_filters, self.cache_factory)


def tensors_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Every tensor that modules hold: parameters, buffers, and tensors kept as plain attributes (quantisation states)."""
    for root in modules:
        for module in root.modules():
            yield from _tensors_in(vars(module), depth=6)


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        if depth and getattr(value, "__dict__", None):
            yield from _tensors_in(vars(value), depth - 1)
    elif isinstance(value, nn.Module) or depth == 0:
        return
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item, depth - 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item, depth - 1)
    elif type(value).__module__.startswith("bitsandbytes") and hasattr(value, "__dict__"):
        yield from _tensors_in(vars(value), depth - 1)


def storage_bytes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each distinct storage behind `tensors`, by address: tied and shared weights count once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


class StorageWatch:
    """Storages behind tensors, watched without being kept alive: tells which have really left memory."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._watched: list[tuple[StorageWeakRef, int, int]] = []
        self.add(tensors)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Watch these too; what is watched already counts once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self.alive():
                self._watched.append((StorageWeakRef(storage), storage.data_ptr(), storage.nbytes()))

    def alive(self) -> dict[int, int]:
        """Bytes by address of storages that somebody holds."""
        return {address: size for storage, address, size in self._watched if not storage.expired()}

    def released_bytes(self) -> int:
        """Bytes of storages that nobody holds any more."""
        return sum(size for storage, _, size in self._watched if storage.expired())


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of weights by what they are for.

    in_use: read when the model runs. kept_for_undo: original weights held only so that a technique can be
    undone. packed: the part of `in_use` that techniques stored in a smaller form.
    """

    in_use: int
    kept_for_undo: int
    packed: int


def weight_bytes(bundle: Bundle, edits: Iterable[Edits], packed: Iterable[nn.Module] = ()) -> WeightBytes:
    """Count the bundle's weights by storage."""
    used = storage_bytes(tensors_of([bundle.model]))
    kept = storage_bytes(tensors_of(m for e in edits for m in e.replaced))
    small = storage_bytes(tensors_of(packed))
    return WeightBytes(sum(used.values()), sum(n for p, n in kept.items() if p not in used), sum(n for p, n in small.items() if p in used))
