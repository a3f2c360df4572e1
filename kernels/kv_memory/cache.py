"""A transformers cache over token-major storage: torch reads it without a copy, C reads it by address."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from core.errors import InvalidRequest
from kernels.kv_memory.layout import KVLayout
from kernels.kv_memory.storage import GrowingStorage, ReservedStorage, Storage


@dataclass(frozen=True)
class KVStats:
    """Memory of one cache, bytes; pages of the system's size.

    used: of the tokens in it. committed: physical memory of its own. reserved: address space. shared: pages that other texts may use too, in none
    of their `committed_bytes`. waited_pages: that a step had to wait for. ahead_pages: that the background thread committed, so that no step
    waited. used_pages: of a reservation, that the tokens lie in. copied: moved because storage grew, or taken over from another text.
    """

    used_bytes: int
    committed_bytes: int
    reserved_bytes: int
    waited_pages: int
    copied_bytes: int
    shared_bytes: int = 0
    ahead_pages: int = 0
    used_pages: int = 0

    @property
    def waste_bytes(self) -> int:
        """Committed or shared, and not used: ends of page groups, and pages kept from earlier texts."""
        return self.committed_bytes + self.shared_bytes - self.used_bytes

    @property
    def faults_avoided(self) -> int:
        """Pages of the tokens that were there when they were first written: shared, kept from an earlier text, or committed ahead."""
        return max(0, self.used_pages - self.waited_pages)


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
        """Forget the last tokens; `tokens_to_remove` is negative as in transformers. Pages stay committed.

        Whoever removes or moves other entries than the last ones says so to `storage.rewind`, as this does.
        """
        self.continue_from(max(0, self.length - abs(tokens_to_remove)))
        self.storage.rewind(self.length)

    def reset(self) -> None:
        """Forget everything."""
        self.continue_from(0)
        self.storage.rewind(0)

    def continue_from(self, tokens: int) -> None:
        """Go on after so many tokens of the storage."""
        self.length, self.ready = tokens, 0


class TokenMajorCache(Cache):
    """The KV cache of one text."""

    layers: list[TokenMajorLayer]  # type: ignore[assignment]

    texts: Any = None
    """The ReservationPool that keeps earlier texts; None: there are none."""
    held: Any = None
    """What that pool lent to this cache."""

    def __init__(self, storages: Sequence[Storage], limit: int | None) -> None:
        super().__init__(layers=[TokenMajorLayer(storage, limit) for storage in storages])

    @property
    def length(self) -> int:
        """Tokens in the first layer."""
        return self.layers[0].length

    def begin(self, ids: Sequence[int], *, reuse: bool) -> int:
        """Before a prompt is read into this cache; returns how many of its first tokens are in it already. See ReservationPool.begin."""
        return int(self.texts.begin(self, ids, reuse=reuse)) if self.texts is not None else 0

    def has_read(self, ids: Sequence[int]) -> None:
        """After a prompt was read: later ones may begin with it."""
        if self.texts is not None:
            self.texts.has_read(self, ids)

    def hold(self, storages: Sequence[Storage]) -> None:
        """Go on over other storages of the same layouts."""
        for layer, storage in zip(self.layers, storages, strict=True):
            layer.storage = storage

    def continue_from(self, tokens: Sequence[int]) -> None:
        """Go on after so many tokens of each layer's storage."""
        for layer, count in zip(self.layers, tokens, strict=True):
            layer.continue_from(count)

    def fork(self, drop: int = 0) -> TokenMajorCache:
        """A second cache with the same content but for the last `drop` tokens of each layer; what is written to one is not in the other.

        Reservations share their whole page groups, others are copied. Nobody may write to this cache meanwhile.

        Raises:
            OutOfMemory: there is no memory left.
        """
        counts = [max(0, layer.length - drop) for layer in self.layers]
        storages = [layer.storage for layer in self.layers]
        if self.texts is not None:
            made: TokenMajorCache = self.texts.cache()
            self.texts.copy(storages, made.held.memory.storages, counts)
        else:
            made = growing_cache([storage.layout for storage in storages])
            for layer, storage, count in zip(made.layers, storages, counts, strict=True):
                layer.storage.copy_from(storage, count)
        made.continue_from(counts)
        return made

    def stats(self) -> KVStats:
        """Memory as it is now."""
        storages = [layer.storage for layer in self.layers]

        def total(name: str) -> int:
            return sum(getattr(storage, name, 0) for storage in storages)

        return KVStats(
            sum(layer.length * layer.storage.layout.token_bytes for layer in self.layers),
            total("committed_bytes"), total("reserved_bytes"), total("waited_pages"), total("copied_bytes"), total("shared_bytes"), total("ahead_pages"),
            sum(layer.storage.used_pages(layer.length) for layer in self.layers if isinstance(layer.storage, ReservedStorage)),
        )


def growing_cache(layouts: Sequence[KVLayout]) -> TokenMajorCache:
    """A cache in ordinary memory that grows by copying."""
    return TokenMajorCache([GrowingStorage(layout) for layout in layouts], None)


CacheFactory = Callable[[], TokenMajorCache]
