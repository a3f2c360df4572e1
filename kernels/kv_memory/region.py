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
from typing import Protocol

import torch
from torch import Tensor

from core.errors import OutOfMemory
from core.units import format_bytes

log = logging.getLogger(__name__)

PAGE_GROUP = 64 * 1024
"""Bytes committed at a time; the smallest page group of vAttention (arXiv 2405.04437, section 6)."""

_NORESERVE, _NOHUGEPAGE, _DONTNEED, _POPULATE_WRITE = 0x4000, 15, 4, 23  # Linux
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


def reservations_work() -> bool:
    """Whether this system lets memory be reserved without committing it."""
    return _LIBC is not None


class Region:
    """`size` bytes of address space. `commit_to` and `release_from` may be called from several threads.

    Raises:
        OutOfMemory: the reservation is larger than what the system grants.
    """

    page_group = PAGE_GROUP

    def __init__(self, size: int) -> None:
        assert _LIBC is not None
        self.size = -(-size // PAGE_GROUP) * PAGE_GROUP
        self.committed = 0
        self._lock = threading.Lock()
        base = _LIBC.mmap(None, self.size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE, -1, 0)
        if base in (None, _FAILED):
            raise OutOfMemory(
                f"{format_bytes(self.size)} of address space for the KV cache cannot be reserved ({os.strerror(ctypes.get_errno())}). "
                "Use a shorter context, or allow overcommit (vm.overcommit_memory 0 or 1)."
            )
        self.base = int(base)
        _LIBC.madvise(self.base, self.size, _NOHUGEPAGE)  # else the kernel commits 2 MB where 64 KB are asked for
        weakref.finalize(self, _LIBC.munmap, self.base, self.size)

    def commit_to(self, size: int) -> int:
        """Commit whole page groups up to `size` bytes; returns the pages newly committed.

        Raises:
            OutOfMemory: there is no memory left; what was committed stays usable.
        """
        with self._lock:
            wanted = min(-(-size // PAGE_GROUP) * PAGE_GROUP, self.size)
            if wanted <= self.committed:
                return 0
            fresh = wanted - self.committed
            self._populate(self.base + self.committed, fresh)
            self.committed = wanted
            return fresh // mmap.PAGESIZE

    def _populate(self, start: int, size: int) -> None:
        assert _LIBC is not None
        if _LIBC.madvise(start, size, _POPULATE_WRITE) == 0:
            return
        code = ctypes.get_errno()
        if code in (errno.ENOMEM, errno.EFAULT):
            raise OutOfMemory(f"The KV cache needs {format_bytes(size)} more and the system has no memory left ({os.strerror(code)}). Start a new chat or use a shorter context.")
        for offset in range(0, size, mmap.PAGESIZE):  # kernels before 5.14: touch each page
            ctypes.memset(start + offset, 0, 1)

    def release_from(self, size: int) -> None:
        """Give back whole page groups beyond `size` bytes; their content is lost."""
        assert _LIBC is not None
        with self._lock:
            kept = min(-(-size // PAGE_GROUP) * PAGE_GROUP, self.committed)
            if kept < self.committed:
                _LIBC.madvise(self.base + kept, self.committed - kept, _DONTNEED)
                self.committed = kept

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

    def commit_to(self, size: int) -> int:
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
                self.pages += region.commit_to(size)
            except OutOfMemory as error:
                log.warning("not committed ahead of need: %s", error)  # the step that needs it will say so
            del region


COMMITTER = Committer()
