"""What the process really holds: resident bytes, and the peak since a mark. Linux; elsewhere the peak is None."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_ROLLUP = Path("/proc/self/smaps_rollup")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Resident set size of this process now."""
    return int(psutil.Process().memory_info().rss)


def proportional_bytes() -> int:
    """Resident memory of this process that no file on disk stands for; a page that is mapped twice counts once. Linux only.

    Raises:
        OSError: the system does not say.
    """
    return 1024 * sum(int(size) for size in re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", _ROLLUP.read_text(), re.MULTILINE))


# limit, use, statistics, and the statistics' name of page cache that the kernel gives back when asked
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes", "/sys/fs/cgroup/memory/memory.stat", "total_inactive_file"),
)


def _cgroup() -> tuple[int, int] | None:
    """Limit and use of this container in bytes, reclaimable page cache not counted as used; None without a limit."""
    for limit_file, used_file, stat_file, cache_name in _CGROUPS:
        try:
            limit = int(Path(limit_file).read_text())
            used = int(Path(used_file).read_text())
        except (OSError, ValueError):
            continue
        return limit, used - _reclaimable(Path(stat_file), cache_name)
    return None


def _reclaimable(stat_file: Path, name: str) -> int:
    try:
        stat = dict(line.split() for line in stat_file.read_text().splitlines())
        return int(stat.get(name, 0))
    except (OSError, ValueError):
        return 0  # some containers keep no statistics


def available_bytes() -> int:
    """Memory that can be had without swapping, a container's limit respected."""
    free, group = int(psutil.virtual_memory().available), _cgroup()
    return max(0, free if group is None else min(free, group[0] - group[1]))


def total_bytes() -> int:
    """Memory this process may use at most: the machine's, or the container's limit."""
    total, group = int(psutil.virtual_memory().total), _cgroup()
    return total if group is None else min(total, group[0])


def return_freed_memory() -> None:
    """Ask the C library to hand memory that was freed back to the system; it keeps much of it for itself otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def reset_peak() -> bool:
    """Start a new peak measurement; False when the system does not let us, so the peak must be called not measured."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int | None:
    """The highest resident set size since `reset_peak()`, None where the system does not tell."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def last_level_cache_bytes() -> int:
    """Size of the CPU's largest cache; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit():
            sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return max(sizes, default=32 * 2**20)
