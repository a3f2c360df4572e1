"""Download from the hub: sizes first, safetensors only, every fault in words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
from huggingface_hub import errors as hub_errors
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential
from tqdm.auto import tqdm

from core.errors import HubUnavailable, InvalidRequest, ModelNotFound, OutOfMemory, UnsafeCheckpoint
from core.progress import Progress, silent
from core.units import format_bytes

_WEIGHTS = "model*.safetensors"
_IGNORED = ("*/*",)
_WANTED = (_WEIGHTS, "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt",
           "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.tiktoken")


@dataclass(frozen=True)
class Snapshot:
    """A repository's files on this disk and the commit they are of."""

    folder: Path
    revision: str


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _worth_retrying(error: BaseException) -> bool:
    status = _status(error)
    return status is not None and (status == 429 or status >= 500)


@contextmanager
def hub_errors_in_words(repo_id: str) -> Iterator[None]:
    """Turn what the hub client raises into errors a person can act on."""
    try:
        yield
    except hub_errors.OfflineModeIsEnabled as error:
        raise HubUnavailable(f"{repo_id} is not on this disk and HF_HUB_OFFLINE is set. Unset it, or choose the embedded model or a local folder.") from error
    except hub_errors.GatedRepoError as error:
        raise HubUnavailable(f"{repo_id} is gated: accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN.") from error
    except hub_errors.RevisionNotFoundError as error:
        raise ModelNotFound(f"{repo_id} has no such revision. Leave the revision empty for the newest.") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ModelNotFound(f"The hub has no model {repo_id} (404), or it is private (401). Check the spelling, or log in.") from error
    except hub_errors.LocalEntryNotFoundError as error:
        raise HubUnavailable(f"{repo_id} is not on this disk and the hub cannot be reached. Check the network, or choose the embedded model.") from error
    except hub_errors.HFValidationError as error:
        raise InvalidRequest(f"{repo_id!r} is not a model id. Use owner/name, a local folder, or embedded.") from error
    except hub_errors.HfHubHTTPError as error:
        raise HubUnavailable(_http_message(repo_id, _status(error))) from error
    except (httpx2.HTTPError, hub_errors.XetDownloadError) as error:
        raise HubUnavailable(_unreachable(repo_id, error)) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutOfMemory(f"The disk is full; {repo_id} cannot be stored. Free space or set HF_HOME to another disk.") from error
        if error.errno in (errno.EROFS, errno.EACCES):
            raise HubUnavailable(f"The hub cache cannot be written ({error.strerror}). Set HF_HOME to a folder you may write.") from error
        raise HubUnavailable(_unreachable(repo_id, error)) from error


def _unreachable(repo_id: str, error: BaseException) -> str:
    return f"The hub cannot be reached for {repo_id} ({type(error).__name__}). Check the network, or choose the embedded model."


def _http_message(repo_id: str, status: int | None) -> str:
    if status == 401:
        return f"The hub refuses {repo_id} (401): log in with `hf auth login` or set HF_TOKEN."
    if status == 403:
        return f"The hub forbids {repo_id} (403): your account has no access to it."
    if status == 429:
        return f"The hub limits requests (429). Wait a few minutes before asking for {repo_id} again."
    return f"The hub answered {status} for {repo_id}. Try again later."


@retry(retry=retry_if_exception(_worth_retrying), stop=stop_after_attempt(3), wait=wait_exponential(0.5, max=8), reraise=True)
def _model_info(repo_id: str, revision: str | None) -> Any:
    return huggingface_hub.HfApi().model_info(repo_id, revision=revision, files_metadata=True)


def safetensors_bytes(repo_id: str, revision: str | None = None) -> tuple[int, str]:
    """Bytes of the weights and the commit, read without downloading.

    Raises:
        UnsafeCheckpoint: the repository has weights only as pickle.
    """
    info = _model_info(repo_id, revision)
    names = {s.rfilename: s.size or 0 for s in info.siblings or ()}
    size = sum(n for name, n in names.items() if fnmatch(name, _WEIGHTS) and "/" not in name)
    if not size:
        if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
            raise UnsafeCheckpoint(f"{repo_id} has only pickle weights, which can run code. Download it yourself and run `python cli.py convert FOLDER OUTPUT`.")
        raise UnsafeCheckpoint(f"{repo_id} has no safetensors weights.")
    return size, str(info.sha)


def _progress_bar(progress: Progress, total: int) -> type[tqdm]:
    class Bar(tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.total and self.unit == "B":
                progress(min(1.0, self.n / total), f"downloaded {format_bytes(self.n)} of {format_bytes(total)}")
            return shown

    return Bar


def fetch(repo_id: str, revision: str | None = None, max_bytes: int | None = None, progress: Progress = silent) -> Snapshot:
    """Download a model's safetensors, configuration and tokenizer; what is on the disk already is not fetched again.

    Args:
        max_bytes: refuse larger weights before the first byte is fetched.

    Raises:
        HubUnavailable, ModelNotFound, UnsafeCheckpoint, OutOfMemory, InvalidRequest: in words.
    """
    with hub_errors_in_words(repo_id):
        try:
            size, commit = safetensors_bytes(repo_id, revision)
        except (hub_errors.OfflineModeIsEnabled, ConnectionError, TimeoutError, httpx2.HTTPError) as error:
            if isinstance(error, hub_errors.RepositoryNotFoundError | hub_errors.RevisionNotFoundError):
                raise
            try:
                folder = Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(_WANTED), ignore_patterns=list(_IGNORED), local_files_only=True))
            except hub_errors.LocalEntryNotFoundError:
                raise error from None
            return Snapshot(folder, folder.name)
        if max_bytes is not None and size > max_bytes:
            raise OutOfMemory(f"{repo_id} has {format_bytes(size)} of weights; {format_bytes(max_bytes)} are free. Choose a smaller model.")
        folder = Path(huggingface_hub.snapshot_download(
            repo_id, revision=commit, allow_patterns=list(_WANTED), ignore_patterns=list(_IGNORED), tqdm_class=_progress_bar(progress, size)))
        return Snapshot(folder, commit)
