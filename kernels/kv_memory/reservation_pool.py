"""Reservations that outlive a request: the next one finds their pages committed, and the start of its prompt already read."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch

from core.errors import OutOfMemory
from core.memory import available_bytes
from core.units import format_bytes
from kernels.kv_memory.cache import TokenMajorCache
from kernels.kv_memory.layout import KVLayout
from kernels.kv_memory.region import Region
from kernels.kv_memory.shared_prefix import PrefixFile, prefix_file
from kernels.kv_memory.storage import CPU, ReservedStorage

KEPT_TEXTS = 4
"""Texts of finished requests that wait for one that begins like them."""


@dataclass(eq=False)
class TextMemory:
    """The reservations of one text. ids: its first tokens, as far as they were read as a prompt and are still in there."""

    storages: list[ReservedStorage]
    ids: tuple[int, ...] = ()

    def restart(self, tokens: int) -> None:
        """Begin a text with the first `tokens` tokens that are in here."""
        for storage in self.storages:
            storage.restart(tokens)

    @property
    def committed_bytes(self) -> int:
        """Physical memory of its own."""
        return sum(storage.committed_bytes for storage in self.storages)


@dataclass
class _Held:
    """What a cache holds now; its finaliser reads it here. begun: its text is known, see `begin`."""

    memory: TextMemory
    begun: bool = False


@dataclass
class ReservationPool:
    """Makes caches over reservations and keeps those of finished requests.

    Source: vAttention, section 6.2 (deferred reclamation). At most `keep_bytes` of committed memory wait, shared pages included; what was not
    used for longest goes first. Safe to use from several threads; one cache is for one thread at a time.
    """

    layouts: Sequence[KVLayout]
    context: int
    keep_bytes: int = 256 * 2**20
    device: torch.device = CPU
    file: PrefixFile | None = None
    _waiting: list[TextMemory] = field(default_factory=list)
    """Least recently used first."""
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def cache(self) -> TokenMajorCache:
        """An empty cache for the whole context.

        Raises:
            OutOfMemory: the reservation is refused.
        """
        with self._lock:
            held = _Held(self._take())
            held.memory.restart(0)
            made = TokenMajorCache(held.memory.storages, self.context)
            made.texts, made.held = self, held
            weakref.finalize(made, self._take_back, held)
            return made

    def _take(self) -> TextMemory:
        """Reservations without a text if there are, new ones while few wait, else those of the oldest text."""
        without = next((memory for memory in self._waiting if not memory.ids), None)
        if without is None and len(self._waiting) < KEPT_TEXTS:
            return self._reserve()
        taken = without or self._waiting[0]
        self._waiting.remove(taken)
        return taken

    def _reserve(self) -> TextMemory:
        try:
            return TextMemory([ReservedStorage(layout, self.context, self.device) for layout in self.layouts])
        except OutOfMemory as error:
            size = sum(layout.token_bytes for layout in self.layouts) * self.context
            raise OutOfMemory(f"A KV cache for {self.context:,} tokens takes {format_bytes(size)} of address space in all. {error}") from error

    def begin(self, cache: TokenMajorCache, ids: Sequence[int], *, reuse: bool) -> int:
        """Before a prompt is read into an empty cache: put the tokens into it that an earlier prompt began with, too.

        An earlier text that goes on is continued where it lies; else its whole page groups are shared and the rest is copied.

        Args:
            reuse: False only looks whether there is memory for the prompt.

        Returns:
            tokens of `ids` that are in the cache now; at least one is left, since the next token follows from it.

        Raises:
            OutOfMemory: there is not enough memory for the prompt.
        """
        with self._lock:
            own: TextMemory = cache.held.memory
            texts = [*self._waiting, own] if reuse else []
            best = max(texts, key=lambda memory: _common(memory.ids, ids), default=own)
            tokens = min(_common(best.ids, ids), len(ids) - 1) if reuse else 0
            if tokens > 0 and best is not own:
                if _common(best.ids, ids) == len(best.ids):
                    self._waiting.remove(best)
                    self._waiting.insert(0, own)
                    cache.hold(best.storages)
                    cache.held.memory = own = best
                    own.restart(tokens)
                else:
                    self._waiting.append(self._waiting.pop(self._waiting.index(best)))  # used now
                    own.ids = ()  # lost now, also where copying fails
                    self.copy(best.storages, own.storages, [tokens] * len(own.storages))
            else:
                own.restart(tokens)
            own.ids, cache.held.begun = tuple(ids[:tokens]), True
            self._refuse_more_than_there_is(own, len(ids))
            cache.continue_from([tokens] * len(own.storages))
            return tokens

    def _refuse_more_than_there_is(self, memory: TextMemory, tokens: int) -> None:
        need = tokens * sum(layout.token_bytes for layout in self.layouts)
        more = need - sum(s.committed_bytes + s.shared_bytes for s in memory.storages)
        if self.device.type == "cpu" and more > 0 and more > (free := available_bytes()):
            raise OutOfMemory(
                f"The KV cache of {tokens:,} prompt tokens takes {format_bytes(need)}, {format_bytes(more)} more than is committed, and {format_bytes(free)} of memory are available. "
                "Start a new chat or shorten the text."
            )

    def has_read(self, cache: TokenMajorCache, ids: Sequence[int]) -> None:
        """After a prompt was read: later ones may begin with it, unless some layer keeps other tokens than all of these."""
        if all(layer.length == len(ids) for layer in cache.layers):
            cache.held.memory.ids = tuple(ids)

    def copy(self, source: Sequence[ReservedStorage], target: Sequence[ReservedStorage], tokens: Sequence[int]) -> None:
        """Make `target` hold the first `tokens` tokens of `source`, layer by layer: whole page groups shared, the rest copied.

        Raises:
            OutOfMemory: there is no memory left.
        """
        regions = [region for storage in source for region in storage.regions.values() if isinstance(region, Region)]
        if self.file is None and regions:
            self.file = prefix_file([region.size for region in regions])
        if self.file is not None:
            self.file.publish(regions, [size for storage, count in zip(source, tokens, strict=True) for size in storage.group_bytes(count)])
        for old, new, count in zip(source, target, tokens, strict=True):
            new.copy_from(old, count)

    def _take_back(self, held: _Held) -> None:
        with self._lock:
            memory = held.memory
            memory.ids = memory.ids[: min(storage.intact for storage in memory.storages)] if held.begun else ()
            self._waiting.insert(len(self._waiting) if memory.ids else 0, memory)
            while len(self._waiting) > 1 and (len(self._waiting) > KEPT_TEXTS or self.committed_bytes() + self.shared_bytes() > self.keep_bytes):
                del self._waiting[0]
            self._trim(self._waiting[-1])

    def _trim(self, memory: TextMemory) -> None:
        share = self.keep_bytes // max(1, len(memory.storages))
        for storage, layout in zip(memory.storages, self.layouts, strict=True):
            tokens = share // layout.token_bytes
            storage.release_from(tokens)
            memory.ids = memory.ids[:tokens]

    def committed_bytes(self) -> int:
        """Physical memory of the reservations that wait, without what they share."""
        return sum(memory.committed_bytes for memory in self._waiting)

    def shared_bytes(self) -> int:
        """Physical memory of prefixes that texts share, each counted once, as the system counts it."""
        return self.file.physical_bytes if self.file is not None else 0


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two texts begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
