"""Where files are kept between runs, and how they are written so that a kill leaves the old one whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """`FUSEBOX_CACHE`, else `fusebox` in the user's cache folder."""
    chosen = os.environ.get("FUSEBOX_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusebox"


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, then put it in its place. On an error the old file stays and nothing is left beside it."""
    with replacing(path) as fresh:
        fresh.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside `path` for the block to fill; it takes the place of `path` at the block's end, and goes on an error.

    Its name is its own, so that two processes which write the same file do not write into each other's.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    fresh = Path(name)
    try:
        yield fresh
        fresh.chmod(0o644)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def keep_within(folder: Path, limit_bytes: int) -> int:
    """Remove files of a folder, the least recently used first, until the rest fit; returns how many went.

    The limit is a quarter of the disk where that is less: of what is free and what the folder holds. Whoever uses a file marks it
    by `os.utime`. What another process has removed meanwhile counts as gone; half-written files of killed processes go with the others.
    """
    held: list[tuple[int, int, Path]] = []
    for path in folder.iterdir():
        try:
            about = path.stat()
        except FileNotFoundError:
            continue
        held.append((about.st_mtime_ns, about.st_size, path))
    total = sum(size for _, size, _ in held)
    allowed, removed = min(limit_bytes, (total + shutil.disk_usage(folder).free) // 4), 0
    for _, size, path in sorted(held):
        if total <= allowed:
            break
        path.unlink(missing_ok=True)
        total -= size
        removed += 1
    return removed
