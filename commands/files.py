"""Files that commands read and write, checked before the work and not after it."""

from __future__ import annotations

from pathlib import Path

from core.errors import InvalidRequest


def check_writable(path: Path | None, option: str = "--json") -> None:
    """Refuse an output file whose folder is missing before the work, not after it."""
    if path is not None and not path.resolve().parent.is_dir():
        raise InvalidRequest(f"{option}: there is no folder {path.parent}. Make it first.")


def read_text(path: Path) -> str:
    """A text file of the user's.

    Raises:
        InvalidRequest: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path.name} is not UTF-8 text.") from error
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from error


def make_folder(folder: Path | None, option: str = "--output") -> None:
    """Make an output folder where it is missing.

    Raises:
        InvalidRequest: it cannot be made.
    """
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"{option}: the folder {folder} cannot be made: {error.strerror}.") from error
