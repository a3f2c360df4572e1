"""Fixtures of all tests: no network, fixed seeds, tiny models of every family, the shared data."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
from pathlib import Path

# Before huggingface_hub and transformers are imported: both read these once.
_HOME = tempfile.mkdtemp(prefix="fusebox-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(
    FUSEBOX_CACHE=os.path.join(_HOME, "fusebox"), HF_HOME=_HOME, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false",
    GRADIO_ANALYTICS_ENABLED="False", HYPOTHESIS_STORAGE_DIRECTORY=os.path.join(_HOME, "hypothesis"),
)

import torch  # noqa: E402

# Before transformers imports Triton, which reads this once: without a device kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import copy  # noqa: E402
import random  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from transformers import PreTrainedTokenizerBase  # noqa: E402

from core.bundle import Bundle  # noqa: E402
from core.loading import load_bundle  # noqa: E402
from engines.embedded.tokenizer import train_tokenizer  # noqa: E402
from tests import families  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("FUSEBOX_SHARED", ROOT.parent / "shared"))

# Tiny models gain nothing from threads, and on a busy machine two threads wait for each other (measured: 10x slower).
torch.set_num_threads(int(os.environ.get("FUSEBOX_TEST_THREADS", "1")))

# No deadline: the machine may be busy. Derandomised: a failure is the same for everybody.
settings.register_profile("fusebox", deadline=None, max_examples=150, derandomize=True, database=None)
settings.load_profile("fusebox")

SENTENCES = (
    "The quick brown fox jumps over the lazy dog while 3 small birds sing.",
    "Machine learning is a field of artificial intelligence that learns from data.",
    "What is artificial intelligence? It is not magic, and nobody should say so!",
    "Climate change is driven by carbon dioxide; the oceans store most of the heat.",
    "A language model predicts the next word (or token) from the words before it.",
    "def add(a, b):\n    return a + b  # code, numbers 0123456789 and a tab\t.",
)
VOCABULARY = 300


class NetworkInTest(RuntimeError):
    """A test tried to leave this machine."""


_LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "", None}


def _refuse(host: object) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name not in _LOCAL_HOSTS:
        raise NetworkInTest(f"a test tried to reach {name!r}; tests run without a network")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine can be reached: name look-ups and connections elsewhere raise."""
    connect, connect_ex, look_up = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                _refuse(address[0])
            return real(self, address)

        return call

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse(host)
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for every test, whatever ran before."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def shared_path(*parts: str) -> Path:
    """A path below the shared data; skips the test, and says so, when it is not there."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"NOT RUN: {path} is missing. Put the shared data beside the repository or set FUSEBOX_SHARED.")
    return path


@pytest.fixture(scope="session")
def shared() -> Callable[..., Path]:
    """`shared("models", "stories260K")`: a path of the shared data, or a loud skip."""
    return shared_path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved byte-level tokenizer with about 300 entries."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(SENTENCES * 3, VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    """The tiny tokenizer; do not change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Path]:
    """`family_checkpoint("gpt2")`: folder of a tiny random model of that family with its tokenizer; made once. Do not write to it."""
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(f"model-{name}")
            families.make_model(name, tokenizer).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[name] = folder
        return made[name]

    return checkpoint


@pytest.fixture(scope="session")
def _pristine() -> dict[str, Bundle]:
    return {}


@pytest.fixture
def family_bundle(family_checkpoint: Callable[[str], Path], _pristine: dict[str, Bundle]) -> Callable[[str], Bundle]:
    """`family_bundle("gpt2")`: a bundle of the family's tiny model with tensors of its own, which a test may change."""

    def bundle(name: str) -> Bundle:
        if name not in _pristine:
            _pristine[name] = load_bundle(str(family_checkpoint(name)))
        whole = _pristine[name]
        return Bundle(copy.deepcopy(whole.model), copy.deepcopy(whole.tokenizer), whole.info)

    return bundle


@pytest.fixture
def llama(family_bundle: Callable[[str], Bundle]) -> Bundle:
    """A tiny Llama with tied embeddings and grouped heads."""
    return family_bundle("llama")


@pytest.fixture(scope="session")
def _stories() -> Iterator[list[Bundle]]:
    yield []


@pytest.fixture
def stories260k(_stories: list[Bundle]) -> Bundle:
    """The really trained 260 k parameter model of the shared data; do not change it."""
    folder = shared_path("models", "stories260K")
    if not _stories:
        _stories.append(load_bundle(str(folder)))
    return _stories[0]
