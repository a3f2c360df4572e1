"""A piece of virtual memory, reserved whole and committed from its start, page group by page group."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import queue
import sys
import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from core.errors import OutOfMemory
from core.memory import available_bytes
from core.units import format_bytes

log = logging.getLogger(__name__)

PAGE_GROUP = 64 * 1024
"""Bytes committed at a time; the smallest page group of vAttention (arXiv 2405.04437, section 6)."""

_FIXED, _NORESERVE, _NOHUGEPAGE, _DONTNEED, _POPULATE_READ, _POPULATE_WRITE = 0x10, 0x4000, 15, 4, 22, 23  # Linux
_READ_WRITE, _PRIVATE, _ANONYMOUS = 0x3, 0x2 | _NORESERVE, 0x20
_FAILED = ctypes.c_void_p(-1).value


def _libc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


_LIBC = _libc()


def whole_groups(size: int) -> int:
    """`size` rounded up to whole page groups."""
    return -(-size // PAGE_GROUP) * PAGE_GROUP


def _limits() -> str:
    """What the system has, for messages."""
    import resource  # Linux only, as all of this is

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    allowed = "" if limit == resource.RLIM_INFINITY else f", {format_bytes(limit)} of address space allowed"
    return f"{format_bytes(available_bytes())} of memory available{allowed}"


def reservations_work() -> bool:
    """Whether this system lets memory be reserved without committing it."""
    return _LIBC is not None


@dataclass(frozen=True)
class SharedPart:
    """Bytes `start` to `end` of a region that are pages of a file, at `offset` there. `owner` lives as long as they are needed."""

    start: int
    end: int
    descriptor: int
    offset: int
    owner: Any

    def until(self, end: int) -> SharedPart:
        """The same without what lies beyond `end`."""
        return self if end >= self.end else replace(self, end=end)


class Region:
    """`size` bytes of address space. Its methods may be called from several threads.

    Raises:
        OutOfMemory: the reservation is larger than what the system grants.
    """

    page_group, page_bytes = PAGE_GROUP, mmap.PAGESIZE

    def __init__(self, size: int) -> None:
        assert _LIBC is not None
        self.size = whole_groups(size)
        self.committed = 0
        """Bytes from the start that can be used without a page fault, shared ones included."""
        self.ahead_pages = 0
        """Pages that the background thread committed."""
        self.parts: tuple[SharedPart, ...] = ()
        """Shared pages, which come first."""
        self._lock = threading.Lock()
        base = _LIBC.mmap(None, self.size, _READ_WRITE, _PRIVATE | _ANONYMOUS, -1, 0)
        if base in (None, _FAILED):
            raise OutOfMemory(
                f"{format_bytes(self.size)} of address space for the KV cache cannot be reserved ({os.strerror(ctypes.get_errno())}; {_limits()}). "
                "Use a shorter context, or allow overcommit (vm.overcommit_memory 0 or 1)."
            )
        self.base = int(base)
        _LIBC.madvise(self.base, self.size, _NOHUGEPAGE)  # else the kernel commits 2 MB where 64 KB are asked for
        weakref.finalize(self, _LIBC.munmap, self.base, self.size)

    @property
    def shared(self) -> int:
        """Bytes from the start that are shared pages."""
        return self.parts[-1].end if self.parts else 0

    @property
    def private_bytes(self) -> int:
        """Committed bytes that are this region's alone."""
        return self.committed - self.shared

    def commit_to(self, size: int, *, ahead: bool = False) -> int:
        """Commit whole page groups up to `size` bytes; returns the pages newly committed.

        Raises:
            OutOfMemory: there is no memory left; what was committed stays usable.
        """
        with self._lock:
            wanted = min(whole_groups(size), self.size)
            if wanted <= self.committed:
                return 0
            pages = self._populate(self.committed, wanted)
            self.committed = wanted
            self.ahead_pages += pages if ahead else 0
            return pages

    def add_shared(self, part: SharedPart) -> None:
        """Put shared pages, which begin where those that are there end, in place of the region's own; a write to one makes a copy of it.

        Raises:
            OutOfMemory: the system refuses the mapping.
        """
        with self._lock:
            assert part.start == self.shared
            self._map(part.start, part.end, _PRIVATE, part.descriptor, part.offset)
            self._advise(part.start, part.end, _POPULATE_READ)  # else each page faults when it is first read
            self.parts = (*self.parts, part)
            self.committed = max(self.committed, part.end)

    def take_shared(self, parts: tuple[SharedPart, ...]) -> int:
        """Share these pages and no others; returns pages newly committed in place of others.

        Raises:
            OutOfMemory: as `add_shared` and `own_from`; the region's content is lost then.
        """
        pages = self.own_from(parts[-1].end if parts else 0)
        self.parts = ()
        for part in parts:
            self.add_shared(part)
        return pages

    def own_from(self, size: int) -> int:
        """Before entries from `size` bytes on are written: shared pages from there on become the region's own.

        Returns:
            pages committed for that; bytes before `size` keep their content.

        Raises:
            OutOfMemory: there is no memory left.
        """
        with self._lock:
            start, end = size // PAGE_GROUP * PAGE_GROUP, self.shared
            if start >= end:
                return 0
            kept = min(whole_groups(size), end)
            pages = self._populate(start, kept)
            if kept < end:
                self._map(kept, end, _PRIVATE | _ANONYMOUS, -1, 0)
                try:
                    pages += self._populate(kept, end)
                except OutOfMemory:
                    self._advise(kept, self.committed, _DONTNEED)
                    self.committed = kept
                    self._keep_parts(start)
                    raise
            self._keep_parts(start)
            return pages

    def release_from(self, size: int) -> None:
        """Give back whole page groups beyond `size` bytes; their content is lost."""
        with self._lock:
            kept = min(whole_groups(size), self.committed)
            if kept < self.shared:
                self._map(kept, self.shared, _PRIVATE | _ANONYMOUS, -1, 0)
                self._keep_parts(kept)
            if kept < self.committed:
                self._advise(kept, self.committed, _DONTNEED)
                self.committed = kept

    def _keep_parts(self, end: int) -> None:
        self.parts = tuple(part.until(end) for part in self.parts if part.start < end)

    def _map(self, start: int, end: int, flags: int, descriptor: int, offset: int) -> None:
        assert _LIBC is not None
        if _LIBC.mmap(self.base + start, end - start, _READ_WRITE, flags | _FIXED, descriptor, offset) in (None, _FAILED):
            raise OutOfMemory(f"{format_bytes(end - start)} of the KV cache cannot be mapped ({os.strerror(ctypes.get_errno())}; {_limits()}). Start a new chat.")
        self._advise(start, end, _NOHUGEPAGE)

    def _advise(self, start: int, end: int, advice: int) -> int:
        assert _LIBC is not None
        return int(_LIBC.madvise(self.base + start, end - start, advice))

    def _populate(self, start: int, end: int) -> int:
        if self._advise(start, end, _POPULATE_WRITE) != 0:
            code = ctypes.get_errno()
            if code in (errno.ENOMEM, errno.EFAULT):
                raise OutOfMemory(
                    f"The KV cache needs {format_bytes(end - start)} more, has {format_bytes(self.private_bytes)} in this layer, and the system has no memory left "
                    f"({os.strerror(code)}; {_limits()}). Start a new chat or use a shorter context."
                )
            for place in range(self.base + start, self.base + end, mmap.PAGESIZE):  # kernels before 5.14: write to each page
                byte = ctypes.c_uint8.from_address(place)
                byte.value = byte.value
        return (end - start) // mmap.PAGESIZE

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The region as a tensor, without a copy; it keeps the region alive. Only committed parts cost memory."""

        class Bytes(ctypes.c_uint8 * self.size):  # type: ignore[misc]
            pass

        view = Bytes.from_address(self.base)
        view.region = self
        flat = torch.frombuffer(view, dtype=dtype)
        count = 1
        for size in shape:
            count *= size
        return flat[:count].view(shape)


class Committable(Protocol):
    """A region of any kind of memory, as the committer sees it."""

    def commit_to(self, size: int, *, ahead: bool = False) -> int:
        """See Region."""


class Committer:
    """A thread that commits page groups before they are needed."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Committable, int]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.pages = 0
        """Pages committed by this thread, whose faults no decode step waited for."""

    def commit_soon(self, region: Committable, size: int) -> None:
        """Ask for `region` to be committed up to `size` bytes."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-commits", daemon=True)
            self._thread.start()
        self._queue.put((region, size))

    def _run(self) -> None:
        while True:
            region, size = self._queue.get()
            try:
                self.pages += region.commit_to(size, ahead=True)
            except OutOfMemory as error:
                log.warning("not committed ahead of need: %s", error)  # the step that needs it will say so
            del region


COMMITTER = Committer()
