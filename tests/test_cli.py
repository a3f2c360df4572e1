"""The command line as a person or a script uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "cli.py", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_chat_writes_answers_metrics_and_provenance(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = cli("chat", "--message", "What is gravity?", "--methods", "baseline", "bnb_int8", "--quick", "--json", str(out))
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert set(record["answers"]) == {"baseline", "bnb_int8"}
    for answer in record["answers"].values():
        assert 0 < answer["metrics"]["output_tokens"] <= 30
        assert answer["metrics"]["ttft_s"] > 0
    assert record["answers"]["bnb_int8"]["reports"][0]["label"] in ("stored", "executed")
    assert record["provenance"]["cpu"] and record["provenance"]["packages"]["torch"]
    assert record["answers"]["baseline"]["text"].strip() in done.stdout
    assert "not measured" not in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--message", ""), "empty"),
        (("--message", "x", "--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("--message", "x", "--temperature", "nan"), "temperature is nan"),
        (("--message", "x", "--top-p", "1.5"), "top_p is 1.5"),
    ],
)
def test_bad_requests_end_with_words_and_status_2(words: tuple[str, ...], said: str) -> None:
    done = cli("chat", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_failing_method_is_said_and_the_other_answers() -> None:
    done = cli("chat", "--message", "What is rain?", "--methods", "baseline", "bnb_int4", "--quick")
    assert done.returncode == 1
    assert "There is no method 'bnb_int4'" in done.stdout
    assert "Decode speed" in done.stdout


def test_folder_that_is_no_model_is_said(tmp_path: Path) -> None:
    done = cli("chat", "--message", "x", "--model", str(tmp_path))
    assert done.returncode == 1
    assert "no .safetensors file" in done.stdout


def test_convert_refuses_a_folder_without_bin_files(tmp_path: Path) -> None:
    done = cli("convert", str(tmp_path), str(tmp_path / "out"))
    assert done.returncode == 2
    assert "pytorch_model" in done.stderr
