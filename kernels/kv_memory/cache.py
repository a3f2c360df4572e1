"""A transformers cache over token-major storage: torch reads it without a copy, C reads it by address."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from core.errors import InvalidRequest
from kernels.kv_memory.layout import KVLayout
from kernels.kv_memory.storage import CPU, GrowingStorage, ReservedStorage, Storage


@dataclass(frozen=True)
class KVStats:
    """Memory of one cache, bytes.

    used: of the tokens in it. committed: physical memory. reserved: address space. waste: committed and not used.
    waited_pages: pages that a step had to wait for. copied: moved because storage grew.
    """

    used_bytes: int
    committed_bytes: int
    reserved_bytes: int
    waited_pages: int
    copied_bytes: int

    @property
    def waste_bytes(self) -> int:
        """Committed and not used."""
        return self.committed_bytes - self.used_bytes


class TokenMajorLayer(CacheLayerMixin):
    """One layer. Batch of one; the window of sliding attention is the mask's business, all tokens are kept."""

    is_sliding = False
    is_croppable = True

    def __init__(self, storage: Storage, limit: int | None) -> None:
        super().__init__()
        self.storage, self.limit = storage, limit
        self.length = 0
        self.ready = 0
        """Tokens that can be written without asking the storage."""
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the layout was known from the start."""

    def ensure(self, tokens: int) -> None:
        """Make room for so many tokens in all.

        Raises:
            InvalidRequest: more than the context holds. OutOfMemory: no memory left.
        """
        if tokens <= self.ready:
            return
        if self.limit is not None and tokens > self.limit:
            raise InvalidRequest(f"The KV cache was reserved for {self.limit} tokens, and this text has {tokens}. Shorten it or start a new chat.")
        self.ready = self.storage.ensure(tokens)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens and return all.

        Args:
            key_states: [1, k_heads, T, head_dim]; value_states likewise.

        Returns:
            keys and values [1, heads, S, head_dim]: views of the storage, or unpacked copies of int8.
        """
        if key_states.shape[0] != 1:
            raise InvalidRequest(f"This KV cache holds one text, not a batch of {key_states.shape[0]}.")
        start, self.length = self.length, self.length + key_states.shape[2]
        try:
            self.ensure(self.length)
        except BaseException:
            self.length = start
            raise
        for name, states in (("keys", key_states), ("values", value_states)):
            self._write(name, states[0].transpose(0, 1), start)
        return self._read("keys"), self._read("values")

    def _write(self, name: str, states: Tensor, start: int) -> None:
        tensors = self.storage.tensors
        if not self.storage.layout.scaled:
            tensors[name][start : self.length] = states
            return
        scale = states.float().abs().amax(-1) / 127
        tensors[f"{name[:-1]}_scales"][start : self.length] = scale
        tensors[name][start : self.length] = (states.float() / scale.clamp(min=1e-30)[..., None]).round().to(torch.int8)

    def _read(self, name: str) -> Tensor:
        tensors = self.storage.tensors
        entries = tensors[name][: self.length]
        if self.storage.layout.scaled:
            entries = entries.float() * tensors[f"{name[:-1]}_scales"][: self.length, :, None]
        return entries.transpose(0, 1)[None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset that the mask needs."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens it may hold; -1 without a bound."""
        return -1 if self.limit is None else self.limit

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; `tokens_to_remove` is negative as in transformers. Pages stay committed."""
        self.length = max(0, self.length - abs(tokens_to_remove))

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0


class TokenMajorCache(Cache):
    """The KV cache of one text."""

    layers: list[TokenMajorLayer]  # type: ignore[assignment]

    def __init__(self, storages: Sequence[Storage], limit: int | None) -> None:
        super().__init__(layers=[TokenMajorLayer(storage, limit) for storage in storages])

    @property
    def length(self) -> int:
        """Tokens in the first layer."""
        return self.layers[0].length

    def stats(self) -> KVStats:
        """Memory as it is now."""
        storages = [layer.storage for layer in self.layers]
        return KVStats(
            sum(layer.length * layer.storage.layout.token_bytes for layer in self.layers),
            sum(s.committed_bytes for s in storages), sum(s.reserved_bytes for s in storages),
            sum(getattr(s, "waited_pages", 0) for s in storages), sum(getattr(s, "copied_bytes", 0) for s in storages),
        )


def growing_cache(layouts: Sequence[KVLayout]) -> TokenMajorCache:
    """A cache in ordinary memory that grows by copying."""
    return TokenMajorCache([GrowingStorage(layout) for layout in layouts], None)


class ReservationPool:
    """Makes caches over reservations and keeps those of finished requests, so that the next one finds its pages committed.

    Source: vAttention, section 6.2 (deferred reclamation). `keep_bytes` of committed memory wait at most; pages beyond are given back.
    """

    def __init__(self, layouts: Sequence[KVLayout], context: int, keep_bytes: int = 256 * 2**20, device: torch.device = CPU) -> None:
        self.layouts, self.context, self.keep_bytes = tuple(layouts), context, keep_bytes
        self.device = device
        self._free: list[list[ReservedStorage]] = []

    def cache(self) -> TokenMajorCache:
        """An empty cache for the whole context.

        Raises:
            OutOfMemory: the reservation is refused.
        """
        storages = self._free.pop() if self._free else [ReservedStorage(layout, self.context, self.device) for layout in self.layouts]
        for storage in storages:
            storage.waited_pages = 0
        made = TokenMajorCache(storages, self.context)
        weakref.finalize(made, self._take_back, storages)
        return made

    def _take_back(self, storages: list[ReservedStorage]) -> None:
        if self._free:  # one set waits; the others' memory goes back to the system
            return
        share = self.keep_bytes // max(1, len(storages))
        for storage in storages:
            storage.release_from(share // storage.layout.token_bytes)
        self._free.append(storages)

    def committed_bytes(self) -> int:
        """Physical memory of the reservations that wait."""
        return sum(storage.committed_bytes for storages in self._free for storage in storages)


CacheFactory = Callable[[], TokenMajorCache]
