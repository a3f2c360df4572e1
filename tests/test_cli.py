"""The command line as a person or a script uses it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cli import main
from engines.methods import method_names

ROOT = Path(__file__).resolve().parent.parent


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "cli.py", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What a command that ends with status 2 says."""
    monkeypatch.setattr(sys, "argv", ["cli.py", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    return capsys.readouterr().err


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
def test_bad_requests_end_with_words_and_status_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str) -> None:
    errors = refused(capsys, monkeypatch, "chat", *words)
    assert said in errors and "Traceback" not in errors


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


def test_compare_takes_several_values_and_writes_all_files(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    llama, opt, out = family_checkpoint("llama"), family_checkpoint("opt_post_norm"), tmp_path / "out"
    queries = tmp_path / "q.csv"
    queries.write_text("question,keywords\nWhat is rain?,water;cloud\n=1+1,\n")
    words = ("compare", "--quick", "--methods", "larosa:calibration_tokens=256", "word_removal:minimum_words=1", "--queries", str(queries), "--models", str(llama), str(opt),
             "--dtype", "float32", "--max-new-tokens", "4", "--output", str(out))
    done = cli(*words)
    assert done.returncode == 1, done.stderr  # LaRoSA refuses one of the models
    record = json.loads((out / "multi_query_results.json").read_text())
    assert record["complete"] is True and record["settings"]["quick"] is True
    assert [m["method"] for m in record["methods"]] == ["baseline", "larosa:calibration_tokens=256", "word_removal:minimum_words=1"]
    assert [(r["model"], r["done"], r["failed"]) for r in record["rows"]] == [(llama.name, 2, 0)] * 3 + [(opt.name, 2, 0), (opt.name, 0, 2), (opt.name, 2, 0)]
    assert "no rotation commutes" in done.stderr and "no rotation commutes" in record["rows"][4]["error"]
    assert str(tmp_path) not in json.dumps(record)
    assert record["provenance"]["cpu"] and record["cells"][0]["prompt"] and record["cells"][0]["metrics"]["ttft_s"] > 0
    assert "'=1+1" in (out / "multi_query_results.csv").read_text() and (out / "multi_query_rows.csv").is_file()
    assert llama.name in done.stdout and "Decode speed" in done.stdout
    again = cli(*words)
    assert again.returncode == 1 and json.loads((out / "multi_query_results.json").read_text())["cells"][0] == record["cells"][0]
    assert cli("figures", str(out)).returncode == 0


def test_compare_refuses_with_words_before_it_begins(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    (tmp_path / "q.csv").write_text("question\n\"x\n")
    for words, says in (
        (("--methods", "int8", "mpo"), "There is no method 'mpo'"),
        (("--methods", "bnb_int8+bnb_nf4"), "same linear layers"),
        (("--queries", str(tmp_path / "q.csv")), "q.csv, line 2: a double quote"),
        (("--queries", str(tmp_path / "gone.csv")), "cannot be read"),
        (("--repeats", "0"), "repeats is 0"),
        (("--device", "gpu"), "device is 'gpu'"),
        (("--temperature", "nan"), "temperature is nan"),
    ):
        said = refused(capsys, monkeypatch, "compare", "--output", out, *words)
        assert says in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
    assert "There is no comparison" in refused(capsys, monkeypatch, "figures", str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="NOT RUN: this machine has a CUDA device")
@pytest.mark.parametrize("command", [("compare",), ("chat", "--message", "x")], ids=["compare", "chat"])
def test_cuda_without_cuda_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], tmp_path: Path) -> None:
    said = refused(capsys, monkeypatch, *command, "--device", "cuda", "--output", str(tmp_path / "out"))
    assert "device is cuda, and PyTorch finds no CUDA device here" in said


def test_interrupted_comparison_says_how_to_go_on(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    words = ["compare", "--methods", "word_removal", "int8", "--models", str(family_checkpoint("llama")), "--dtype", "float32", "--max-new-tokens", "60",
             "--repeats", "20", "--output", str(tmp_path / "out")]
    (tmp_path / "q.txt").write_text("What is rain?\nWhat is snow?")
    with subprocess.Popen([sys.executable, "cli.py", *words, "--queries", str(tmp_path / "q.txt")], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while len(list((tmp_path / "out" / "cells").glob("*.json"))) < 3:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from here" in said and "Traceback" not in said
    record = json.loads((tmp_path / "out" / "multi_query_results.json").read_text())
    assert record["complete"] is False and {"done", "pending"} <= {c["status"] for c in record["cells"]}


def test_chat_over_all_methods_writes_comprehensive_results(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    done = cli("chat", "--message", "What is rain made of?", "--model", str(family_checkpoint("llama")), "--methods", "all", "--dtype", "float32", "--max-new-tokens", "4", "--output", str(tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "comprehensive_results.json").read_text())
    assert set(record["answers"]) | set(record["errors"]) == set(method_names())
    assert done.returncode == (1 if record["errors"] else 0)
    entries = {m["method"]: m for m in record["methods"]}
    assert "int4" in entries["all_combined"]["excluded"] and "int8" in entries["all_combined"]["members"]
    assert all(a["metrics"]["baseline_answer_bits_per_byte"] is not None for a in record["answers"].values())


def test_train_classifier_writes_a_model_and_its_measured_card(family_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for split, words in (("train", ("fine", "bad", "lovely", "dull")), ("validation", ("good", "poor"))):
        (tmp_path / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(f"a {word} day\t{1 - i % 2}\n" for i, word in enumerate(words)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["cli.py", "train", "classifier", "--model", str(family_checkpoint("llama")), "--dataset", str(tmp_path), "--output", str(tmp_path / "out"), "--epochs", "1"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    figures = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    said = capsys.readouterr().out
    assert f"{figures['accuracy']:.1%}" in said and figures["validation_examples"] == 2 and figures["chance"] == 0.5
    assert figures["labels"] == ["0", "1"] and str(tmp_path) not in json.dumps(figures)


@pytest.mark.parametrize(("words", "said"), [
    (("--dataset", "/no/such/folder"), "there is no such folder"), (("--learning-rate", "nan", "--limit", "8"), "learning_rate is nan"), (("--model", "embedded/none"), "no embedded model"),
])
def test_train_classifier_refuses_with_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str, family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = () if "--model" in words else ("--model", str(family_checkpoint("llama")))
    assert said in refused(capsys, monkeypatch, "train", "classifier", *model, *words, "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
