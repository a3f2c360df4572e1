"""Decode steps by the C library over a token-major cache."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from core.errors import InvalidRequest
from engines.native.compiler import Compiled
from kernels.kv_memory.cache import TokenMajorCache, TokenMajorLayer
from kernels.structures import MOST_TOKENS, Cached, address, kind_of


class NativeDecoder:
    """Runs a compiled program. Several threads may call it; they take turns."""

    def __init__(self, compiled: Compiled, library: ctypes.CDLL, context: int) -> None:
        self.compiled, self.context = compiled, context
        self.steps = 0
        """Decode steps run in C since this was built."""
        self._library = library
        self._lock = threading.Lock()
        self._bound: tuple[Any, tuple[int, ...]] = (None, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeDecoder:
        return self

    def __call__(self, tokens: Sequence[int], cache: Any) -> Tensor:
        """The logits [tokens, vocab_size] float32 after 1 to 4 tokens that follow what the cache holds; valid until the next call.

        Raises:
            InvalidRequest: beyond the context. OutOfMemory: no memory for the cache; it is as before then.
        """
        if not isinstance(cache, TokenMajorCache) or not 1 <= len(tokens) <= MOST_TOKENS:
            raise InvalidRequest(f"The native runtime decodes 1 to {MOST_TOKENS} tokens over a token-major cache; it got {len(tokens)} over a {type(cache).__name__}.")
        position = cache.length
        end = position + len(tokens)
        if end > self.context:
            raise InvalidRequest(f"The native runtime was compiled for {self.context} tokens, and this text has {end}. Shorten it or start a new chat.")
        with self._lock:
            for layer in cache.layers:
                layer.ensure(end)
            self._bind(cache)
            logits = self.compiled.program.run(self._library, list(tokens), position)
            for layer in cache.layers:
                layer.length = end
            self.steps += 1
            return logits

    def _bind(self, cache: TokenMajorCache) -> None:
        """Tell the program where the cache lies, where that is news."""
        places = tuple(layer.storage.tensors["keys"].data_ptr() for layer in cache.layers)
        owner, known = self._bound
        if known == places and owner is not None and owner() is cache:
            return
        for index, layer in enumerate(cache.layers):
            self.compiled.program.set_layer(index, _cached(layer))
        self._bound = (weakref.ref(cache), places)


def _cached(layer: TokenMajorLayer) -> Cached:
    layout, tensors = layer.storage.layout, layer.storage.tensors
    return Cached(
        kind_of(layout.dtype), layout.k_heads, layout.v_heads, layout.head_dim, layout.v_head_dim or layout.head_dim,
        *(address(tensors.get(name)) for name in ("keys", "values", "key_scales", "value_scales")),
    )
