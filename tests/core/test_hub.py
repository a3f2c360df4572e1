"""The hub's faults in words, sizes before downloads, retries, and what is on the disk already. No network: the client is replaced."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import hf_raise_for_status

from core import hub
from core.errors import FuseboxError, HubUnavailable, InvalidRequest, ModelNotFound, OutOfMemory, UnsafeCheckpoint
from core.hub import fetch, safetensors_bytes
from core.units import format_bytes

COMMIT = "c" * 40
REPO = "owner/name"
URL = f"https://huggingface.co/api/models/{REPO}"


def http_error(status: int, code: str | None = None) -> Exception:
    """The exception the real client raises for an answer of the hub."""
    response = httpx2.Response(status, headers={"X-Error-Code": code} if code else {}, request=httpx2.Request("GET", URL))
    try:
        hf_raise_for_status(response)
    except Exception as error:
        return error
    raise AssertionError("no error")


class FakeHub:
    """Stands for the client: what model_info and snapshot_download do, and how often they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, int | None] = {"model.safetensors": 1000, "config.json": 10}
        self.info_errors: list[Exception | None] = []
        self.download_error: Exception | None = None
        self.cached: Path | None = None
        self.asked = 0
        self.slept: list[float] = []
        self.downloads: list[dict[str, Any]] = []

    def model_info(self, api: Any, repo_id: str, *, revision: str | None, files_metadata: bool) -> Any:
        assert files_metadata, "sizes are only there when asked for"
        error = self.info_errors[min(self.asked, len(self.info_errors) - 1)] if self.info_errors else None
        self.asked += 1
        if error is not None:
            raise error
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in self.files.items()])

    def snapshot_download(self, repo_id: str, **kwargs: Any) -> str:
        if kwargs.get("local_files_only"):
            if self.cached is None:
                raise hub_errors.LocalEntryNotFoundError("not in the cache")
            return str(self.cached)
        self.downloads.append(kwargs)
        if self.download_error is not None:
            raise self.download_error
        return str(self.folder)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    made = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, *args, **kwargs: made.model_info(api, *args, **kwargs))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(hub._model_info.retry, "sleep", made.slept.append)
    return made


# What works.


def test_fetch_downloads_the_commit_it_read_the_sizes_of(fake: FakeHub) -> None:
    snapshot = fetch(REPO, "main")
    assert snapshot == hub.Snapshot(fake.folder, COMMIT)
    assert [call["revision"] for call in fake.downloads] == [COMMIT]


def test_fetch_asks_for_safetensors_configuration_and_tokenizer_only(fake: FakeHub) -> None:
    from fnmatch import fnmatch

    fetch(REPO)
    patterns = fake.downloads[0]["allow_patterns"]
    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
              "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "chat_template.jinja"]
    unwanted = ["pytorch_model.bin", "model.pt", "modeling_custom.py", "flax_model.msgpack", "README.md", "rust_model.ot", "model.onnx", "training_args.bin"]
    assert [n for n in wanted if not any(fnmatch(n, p) for p in patterns)] == []
    assert [n for n in unwanted if any(fnmatch(n, p) for p in patterns)] == []


def test_sizes_are_the_sum_of_the_safetensors_files(fake: FakeHub) -> None:
    fake.files = {"model-00001-of-00002.safetensors": 700, "model-00002-of-00002.safetensors": 50, "pytorch_model.bin": 9999, "config.json": 3}
    assert safetensors_bytes(REPO) == (750, COMMIT)


def test_download_reports_bytes_as_a_fraction_of_the_weights(fake: FakeHub) -> None:
    fake.files = {"model.safetensors": 2048}
    seen: list[tuple[float, str]] = []
    fetch(REPO, progress=lambda fraction, message: seen.append((fraction, message)))
    bar = fake.downloads[0]["tqdm_class"](total=2048, unit="B", disable=False, file=open("/dev/null", "w"))  # noqa: SIM115
    bar.update(512)
    bar.update(1600)  # configuration and tokenizer come on top of the weights
    bar.close()
    files = fake.downloads[0]["tqdm_class"](total=3, unit="it", file=open("/dev/null", "w"))  # noqa: SIM115
    files.update(1)
    files.close()
    assert seen[0] == (0.25, f"downloaded 512 B of {format_bytes(2048)}")
    assert seen[-1][0] == 1.0 and len(seen) == 2


# Refused before the first byte.


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_only_repository_is_refused_before_download(name: str, fake: FakeHub) -> None:
    fake.files = {name: 10**9, "config.json": 10}
    with pytest.raises(UnsafeCheckpoint, match="only pickle weights.*cli.py convert"):
        fetch(REPO)
    assert fake.downloads == []


def test_repository_without_weights_is_refused_before_download(fake: FakeHub) -> None:
    fake.files = {"README.md": 10, "model.gguf": 10**9}
    with pytest.raises(UnsafeCheckpoint, match="no safetensors weights"):
        fetch(REPO)
    assert fake.downloads == []


def test_repository_that_does_not_fit_is_refused_before_download_with_the_numbers(fake: FakeHub) -> None:
    fake.files = {"model.safetensors": 3 * 1024**3}
    with pytest.raises(OutOfMemory, match=r"3\.0 GiB of weights; 1\.0 GiB are free"):
        fetch(REPO, max_bytes=1024**3)
    assert fake.downloads == []
    fetch(REPO, max_bytes=3 * 1024**3)
    assert len(fake.downloads) == 1


# Answers of the hub.


@pytest.mark.parametrize(("status", "code", "kind", "said"), [
    (401, "RepoNotFound", ModelNotFound, "no model owner/name.*private.*Check the spelling"),
    (404, "RepoNotFound", ModelNotFound, "404"),
    (404, "RevisionNotFound", ModelNotFound, "no such revision"),
    (403, "GatedRepo", HubUnavailable, "gated.*accept its terms"),
    (401, "GatedRepo", HubUnavailable, "gated.*HF_TOKEN"),
    (403, None, HubUnavailable, "403.*no access"),
    (418, None, HubUnavailable, "answered 418"),
])
def test_refusal_of_the_hub_is_said_once_and_in_words(status: int, code: str | None, kind: type[FuseboxError], said: str, fake: FakeHub) -> None:
    fake.info_errors = [http_error(status, code)]
    with pytest.raises(kind, match=said):
        fetch(REPO)
    assert fake.asked == 1 and fake.slept == [] and fake.downloads == []


def test_plain_401_names_the_login(fake: FakeHub) -> None:
    response = httpx2.Response(401, request=httpx2.Request("GET", URL))
    fake.info_errors = [hub_errors.HfHubHTTPError("401", response=response)]
    with pytest.raises(HubUnavailable, match="hf auth login"):
        fetch(REPO)


@pytest.mark.parametrize(("status", "said"), [(429, r"limits requests \(429\).*Wait"), (500, "answered 500"), (503, "answered 503")])
def test_busy_hub_is_asked_three_times_then_said(status: int, said: str, fake: FakeHub) -> None:
    fake.info_errors = [http_error(status)]
    with pytest.raises(HubUnavailable, match=said):
        fetch(REPO)
    assert fake.asked == 3 and len(fake.slept) == 2 and fake.slept[0] < fake.slept[1] <= 8


@pytest.mark.parametrize("failures", [1, 2])
def test_busy_hub_that_recovers_is_used(failures: int, fake: FakeHub) -> None:
    fake.info_errors = [http_error(429)] * failures + [None]
    assert fetch(REPO).revision == COMMIT
    assert fake.asked == failures + 1


def test_id_the_client_refuses_is_an_invalid_request(fake: FakeHub) -> None:
    fake.info_errors = [hub_errors.HFValidationError("bad id")]
    with pytest.raises(InvalidRequest, match="not a model id"):
        fetch("a b/c")


# No network.


UNREACHABLE: list[Any] = [
    pytest.param(hub_errors.OfflineModeIsEnabled("offline"), id="offline mode"),
    pytest.param(ConnectionError("no route"), id="no route"),
    *(pytest.param(error, id=type(error).__name__)
      for error in (httpx2.ConnectError("Name or service not known"), httpx2.ConnectTimeout("slow"), httpx2.ReadTimeout("slow"), httpx2.RemoteProtocolError("cut"))),
]


@pytest.mark.parametrize("error", UNREACHABLE)
def test_unreachable_hub_is_said_and_other_models_are_named(error: Exception, fake: FakeHub) -> None:
    fake.info_errors = [error]
    with pytest.raises(HubUnavailable, match="owner/name.*embedded"):
        fetch(REPO)


@pytest.mark.parametrize("error", [*UNREACHABLE, pytest.param(http_error(503), id="503"), pytest.param(http_error(429), id="429")])
def test_unreachable_hub_does_not_matter_for_a_model_on_the_disk(error: Exception, fake: FakeHub) -> None:
    fake.info_errors = [error]
    fake.cached = fake.folder / COMMIT
    assert fetch(REPO) == hub.Snapshot(fake.folder / COMMIT, COMMIT)
    assert fake.downloads == []


@pytest.mark.parametrize(("status", "code"), [(404, "RepoNotFound"), (404, "RevisionNotFound")])
def test_refused_model_is_not_taken_from_the_disk(status: int, code: str, fake: FakeHub) -> None:
    fake.info_errors = [http_error(status, code)]
    fake.cached = fake.folder / COMMIT
    with pytest.raises(ModelNotFound):
        fetch(REPO)


# While downloading.


@pytest.mark.parametrize(("error", "kind", "said"), [
    (OSError(errno.ENOSPC, "No space left on device"), OutOfMemory, "disk is full.*HF_HOME"),
    (OSError(errno.EROFS, "Read-only file system"), HubUnavailable, "cannot be written.*Read-only file system.*HF_HOME"),
    (PermissionError(errno.EACCES, "Permission denied"), HubUnavailable, "cannot be written.*Permission denied"),
    (ConnectionResetError(errno.ECONNRESET, "reset"), HubUnavailable, "cannot be reached"),
    (TimeoutError("slow"), HubUnavailable, "cannot be reached"),
    (http_error(500), HubUnavailable, "answered 500"),
    (hub_errors.LocalEntryNotFoundError("gone"), HubUnavailable, "hub cannot be reached"),
    pytest.param(httpx2.ReadTimeout("slow"), HubUnavailable, "cannot be reached"),
    pytest.param(hub_errors.XetDownloadError("cut"), HubUnavailable, "cannot be reached"),
], ids=lambda value: repr(value)[:40] if isinstance(value, Exception) else None)
def test_download_fault_is_said_in_words(error: Exception, kind: type[FuseboxError], said: str, fake: FakeHub) -> None:
    fake.download_error = error
    with pytest.raises(kind, match=said) as caught:
        fetch(REPO)
    assert caught.value.__cause__ is error


def test_error_that_is_not_the_hubs_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), hub.hub_errors_in_words(REPO):
        raise ZeroDivisionError


def test_no_error_passes_through_unchanged() -> None:
    done: list[Callable[[], None]] = []
    with hub.hub_errors_in_words(REPO):
        done.append(lambda: None)
    assert len(done) == 1
