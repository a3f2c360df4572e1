"""Provenance: real versions, the commit when there is one, nothing private."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from core import provenance as module


@pytest.fixture(autouse=True)
def fresh() -> None:
    module.provenance.cache_clear()


def test_versions_are_those_that_run() -> None:
    known = module.provenance()
    assert known["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert known["packages"]["transformers"] == transformers.__version__
    assert known["python"] == platform.python_version() and known["threads"] == torch.get_num_threads()
    assert known["memory_bytes"] > 1 << 28 and known["cpu_cores"] >= 1


def test_missing_package_is_none_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package-here"))
    assert module.provenance()["packages"]["no-such-package-here"] is None


def test_it_is_json_and_names_no_path_or_user() -> None:
    text = json.dumps(module.provenance())
    assert str(Path.home()) not in text and os.getcwd() not in text and platform.node() not in json.loads(text).values()


@pytest.mark.parametrize(("dirty", "expected"), [("", "abc"), (" M core/units.py\n", "abc+")])
def test_commit_is_marked_when_files_were_changed(dirty: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, "abc\n" if "rev-parse" in command else dirty)

    monkeypatch.setattr(module.subprocess, "run", run)
    assert module.git_commit() == expected


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git"), subprocess.TimeoutExpired("git", 5)])
def test_commit_outside_a_checkout_is_none(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(module.subprocess, "run", run)
    assert module.git_commit() is None


def test_cpu_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.cpu_name().strip()
