"""Where one layer's keys and values are kept: in a reservation, or in memory that grows by copying."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from core.errors import MissingDependency
from kernels.kv_memory.cuda_region import CudaRegion, cuda_driver
from kernels.kv_memory.layout import KVLayout, token_bytes
from kernels.kv_memory.region import COMMITTER, Region

CPU = torch.device("cpu")


class Storage(Protocol):
    """Tensors by name of the layout's parts, [capacity, *token shape] each."""

    layout: KVLayout
    tensors: dict[str, Tensor]

    def ensure(self, tokens: int) -> int:
        """Make the first `tokens` tokens usable; returns how many really are. Tensors may be others afterwards."""

    def rewind(self, tokens: int) -> None:
        """Say that entries from token `tokens` on will be written again, or have been moved. The next `ensure` makes room for them."""

    def copy_from(self, other: Any, tokens: int) -> None:
        """Take over the first `tokens` tokens of another storage of this layout, in place of what is in this one.

        Raises:
            OutOfMemory: no memory left; the content is lost then.
        """

    @property
    def committed_bytes(self) -> int:
        """Bytes that cost physical memory."""

    @property
    def reserved_bytes(self) -> int:
        """Bytes of address space."""


class GrowingStorage:
    """Ordinary tensors, twice as large whenever they are full: what most runtimes do. The old content is copied then."""

    def __init__(self, layout: KVLayout, first: int = 256) -> None:
        self.layout, self._first = layout, first
        self.tensors = {name: torch.empty(0, *shape, dtype=dtype) for name, (shape, dtype) in layout.parts().items()}
        self.copied_bytes = 0

    def ensure(self, tokens: int) -> int:
        """See Storage."""
        capacity = len(self.tensors["keys"])
        if tokens > capacity:
            larger = max(tokens, 2 * capacity, self._first)
            for name, old in self.tensors.items():
                new = torch.empty(larger, *old.shape[1:], dtype=old.dtype)
                new[:capacity] = old
                self.tensors[name] = new
                self.copied_bytes += old.nbytes
            capacity = larger
        return capacity

    def rewind(self, tokens: int) -> None:
        """See Storage: nothing to do."""

    @torch.inference_mode()
    def copy_from(self, other: GrowingStorage, tokens: int) -> None:
        """See Storage."""
        self.ensure(tokens)
        for name, tensor in self.tensors.items():
            tensor[:tokens] = other.tensors[name][:tokens]
            self.copied_bytes += tensor[:tokens].nbytes

    @property
    def committed_bytes(self) -> int:
        """All of it."""
        return sum(t.nbytes for t in self.tensors.values())

    reserved_bytes = committed_bytes


def make_region(size: int, device: torch.device) -> Region | CudaRegion:
    """A region of the kind of memory that the device reads.

    Raises:
        OutOfMemory: the reservation is refused. MissingDependency: no CUDA driver.
    """
    if device.type == "cpu":
        return Region(size)
    driver = cuda_driver(device)
    if driver is None:
        raise MissingDependency(f"Memory of {device} can be reserved by the CUDA driver (libcuda.so.1) only, and there is none here.")
    return CudaRegion(size, driver)


class ReservedStorage:
    """One reservation for each part, as long as the context; page groups are committed as tokens come. Nothing is ever copied.

    Source: vAttention (arXiv 2405.04437), section 5.
    """

    def __init__(self, layout: KVLayout, context: int, device: torch.device = CPU) -> None:
        self.layout, self.context = layout, context
        self._token = {name: token_bytes(shape, dtype) for name, (shape, dtype) in layout.parts().items()}
        self.regions = {name: make_region(context * size, device) for name, size in self._token.items()}
        self.tensors = {name: self.regions[name].tensor((context, *shape), dtype) for name, (shape, dtype) in layout.parts().items()}
        self.restart(0)

    def restart(self, tokens: int) -> None:
        """Begin another text whose first `tokens` tokens are those that are in here; the counts start again."""
        self.waited_pages = self.copied_bytes = 0
        self.intact = self.context
        """First tokens that were not written again since."""
        self._ahead = sum(region.ahead_pages for region in self.regions.values())
        self._rewound = min(tokens, self.context)

    def ensure(self, tokens: int) -> int:
        """See Storage. A page group ahead is asked for in the background."""
        if self._rewound < self.context:
            for name, region in self.regions.items():
                self.waited_pages += region.own_from(self._rewound * self._token[name])
            self._rewound = self.context
        for name, region in self.regions.items():
            need = tokens * self._token[name]
            if need > region.committed:
                self.waited_pages += region.commit_to(need)
            if need + region.page_group > region.committed and region.committed < region.size:
                COMMITTER.commit_soon(region, need + region.page_group)
        return self.ready

    def rewind(self, tokens: int) -> None:
        """See Storage."""
        self._rewound, self.intact = min(self._rewound, tokens), min(self.intact, tokens)

    def group_bytes(self, tokens: int) -> list[int]:
        """For each part, the bytes of the page groups that hold nothing but the first `tokens` tokens."""
        return [tokens * self._token[name] // region.page_group * region.page_group for name, region in self.regions.items()]

    @torch.inference_mode()
    def copy_from(self, other: ReservedStorage, tokens: int) -> None:
        """See Storage. What is shared in `other` is shared, the rest copied."""
        self.restart(tokens)
        for (name, region), whole in zip(self.regions.items(), self.group_bytes(tokens), strict=True):
            source, size = other.regions[name], tokens * self._token[name]
            self.waited_pages += region.take_shared(tuple(part.until(whole) for part in source.parts if part.start < whole))
            self.waited_pages += region.commit_to(size)
            mine, theirs = (storage.tensors[name].flatten().view(torch.uint8) for storage in (self, other))
            mine[region.shared : size] = theirs[region.shared : size]
            self.copied_bytes += size - region.shared

    @property
    def ready(self) -> int:
        """Tokens whose pages are committed in every part."""
        return min(self.context, *(region.committed // self._token[name] for name, region in self.regions.items()))

    def release_from(self, tokens: int) -> None:
        """Give back pages beyond so many tokens."""
        for name, region in self.regions.items():
            region.release_from(tokens * self._token[name])

    @property
    def ahead_pages(self) -> int:
        """Pages that the background thread committed for this text."""
        return sum(region.ahead_pages for region in self.regions.values()) - self._ahead

    def used_pages(self, tokens: int) -> int:
        """Pages that the first `tokens` tokens lie in."""
        return sum(-(-tokens * self._token[name] // region.page_bytes) for name, region in self.regions.items())

    @property
    def committed_bytes(self) -> int:
        """Of all parts, without what is shared."""
        return sum(region.private_bytes for region in self.regions.values())

    @property
    def shared_bytes(self) -> int:
        """Of all parts: pages that other texts may use too."""
        return sum(region.shared for region in self.regions.values())

    @property
    def reserved_bytes(self) -> int:
        """Of all parts."""
        return sum(region.size for region in self.regions.values())
