"""Pages that several texts have in common, in one sealed file in memory that each of them maps privately."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import weakref
from collections import deque
from collections.abc import Sequence

from core.units import format_bytes
from kernels.kv_memory.region import Region, SharedPart

log = logging.getLogger(__name__)

SLOTS = 16
"""Prefixes that one file holds at most."""
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # Linux


class Slot:
    """A part of the file, as long as all regions of a text. It is freed, hole by hole, when the last region that maps it lets go."""

    def __init__(self, file: PrefixFile, index: int) -> None:
        self.file, self.start = file, index * file.slot_bytes
        weakref.finalize(self, file._free_again, index)

    def write(self, offset: int, address: int, size: int) -> None:
        """Copy `size` bytes of memory to `offset` of the slot.

        Raises:
            OSError: no memory left.
        """
        view = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
        while view:
            written = os.pwrite(self.file.descriptor, view, self.start + offset)
            view, offset = view[written:], offset + written


class PrefixFile:
    """A memfd whose size is sealed. Only pages that were written cost memory; the file is gone with the process.

    Source: vAttention (arXiv 2405.04437), its code's map_common_pages. Deviates: copy on write instead of pages nobody may write to again.
    F_SEAL_FUTURE_WRITE is not set: Linux refuses to punch holes into a file that has it, and pages could then not be freed one prefix at a
    time. Nobody but `Slot.write` writes to the file: its descriptor stays in here and is mapped privately only.

    Args:
        region_bytes: sizes of a text's regions, in order.

    Raises:
        OSError: this system has no such files.
    """

    def __init__(self, region_bytes: Sequence[int]) -> None:
        import fcntl  # not on Windows

        self.offsets = tuple(sum(region_bytes[:i]) for i in range(len(region_bytes)))
        self.slot_bytes = sum(region_bytes)
        self.descriptor = os.memfd_create("fusebox-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, SLOTS * self.slot_bytes)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._free = deque(range(SLOTS))

    def publish(self, regions: Sequence[Region], sizes: Sequence[int]) -> bool:
        """Move the first `sizes` bytes of each region, multiples of a page group, into the file, but for what is there already.

        The regions' own pages are freed and the file's mapped in their place; addresses and contents stay. Nobody may write meanwhile.

        Returns:
            False where there is no slot or no memory left; the regions are as before then.
        """
        missing = [(place, region, region.shared, size) for place, (region, size) in enumerate(zip(regions, sizes, strict=True)) if size > region.shared]
        if not missing:
            return True
        if not self._free:
            return False
        slot = Slot(self, self._free.popleft())
        try:
            for place, region, start, end in missing:
                slot.write(self.offsets[place] + start, region.base + start, end - start)
        except OSError as error:
            log.warning("a prefix of the KV cache is not shared: %s", str(error))
            return False
        for place, region, start, end in missing:
            region.add_shared(SharedPart(start, end, self.descriptor, slot.start + self.offsets[place] + start, slot))
        return True

    @property
    def physical_bytes(self) -> int:
        """Memory that the file takes, as the system counts it."""
        return os.fstat(self.descriptor).st_blocks * 512

    @property
    def slots_in_use(self) -> int:
        """Prefixes in the file."""
        return SLOTS - len(self._free)

    def _free_again(self, index: int) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        library.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
        if library.fallocate(self.descriptor, _KEEP_SIZE | _PUNCH_HOLE, index * self.slot_bytes, self.slot_bytes) != 0:
            log.warning("up to %s of shared KV pages were not freed: %s", format_bytes(self.slot_bytes), os.strerror(ctypes.get_errno()))
        self._free.append(index)


def prefix_file(region_bytes: Sequence[int]) -> PrefixFile | None:
    """A file for prefixes; None where the system has none, which is said once in the log."""
    try:
        return PrefixFile(region_bytes)
    except (OSError, AttributeError, ImportError) as error:
        log.warning("prefixes of the KV cache are copied, not shared: %s", str(error))
        return None


def sharing_works() -> bool:
    """Whether this system has files in memory that can be sealed and freed in parts."""
    return prefix_file((mmap.PAGESIZE,)) is not None
