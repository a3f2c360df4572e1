"""The sweep: rows that add up, rivals in the same table, bad input refused before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli import app
from core.bundle import Bundle, storage_bytes, tensors_of
from core.errors import CalibrationError, FuseboxError, InvalidRequest, UnsupportedModel
from core.evaluation import score_text
from engines.larosa_sweep import bytes_per_token, held_out_project_texts, sweep
from engines.static_figures import quality_against_bytes, save_figure
from optim.larosa.technique import VARIANTS
from tests.contract import assert_unchanged, snapshot

TEXTS = ["The sea is deep and cold, and light does not reach the bottom of it. Fish there make light of their own. " * 30]


@pytest.fixture(scope="module")
def swept(request: pytest.FixtureRequest) -> dict[str, Any]:
    checkpoint: Callable[[str], Path] = request.getfixturevalue("family_checkpoint")
    from core.loading import load_bundle

    bundle = load_bundle(str(checkpoint("llama")))
    before = snapshot(bundle)
    data = sweep(bundle, TEXTS, sparsities=(0.0, 0.5, 0.75), tokens=256, calibration_tokens=1024)
    assert_unchanged(before, bundle, "swept")
    return {**data, "bundle": bundle}


def test_every_variant_has_a_row_or_a_reason(swept: dict[str, Any]) -> None:
    rows = {(r["variant"], r["sparsity"]) for r in swept["rows"]}
    refused = {(r["variant"], r["sparsity"]) for r in swept["refused"]}
    assert rows | refused == {(v, s) for v in VARIANTS for s in (0.0, 0.5, 0.75)} and not rows & refused
    assert refused == {("cats", 0.5), ("cats", 0.75)}
    assert "at most" in swept["refused"][0]["reason"]


def test_without_sparsity_every_variant_scores_as_the_dense_model(swept: dict[str, Any]) -> None:
    for row in swept["rows"]:
        if row["sparsity"] == 0:
            assert row["bits_per_byte"] == pytest.approx(swept["dense"]["bits_per_byte"], rel=1e-4)
            assert row["agreement"] > 0.99


def test_dense_score_is_that_of_decoding(swept: dict[str, Any]) -> None:
    bundle: Bundle = swept["bundle"]
    score = score_text(bundle, TEXTS[0] + "\n\n", max_tokens=bundle.context_length)
    single = sweep(bundle, TEXTS, sparsities=(0.0,), variants=("topk",), tokens=128, calibration_tokens=1024)["dense"]
    assert single["tokens"] == score.tokens
    assert single["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-4)


def test_bytes_add_up(swept: dict[str, Any]) -> None:
    bundle: Bundle = swept["bundle"]
    whole = sum(storage_bytes(tensors_of([bundle.model])).values())
    buffers = sum(storage_bytes(bundle.model.buffers()).values())
    assert swept["dense"]["bytes_per_token"] == bytes_per_token(bundle, 0.0)["bytes_per_token"]
    assert whole - buffers <= swept["dense"]["bytes_per_token"] <= whole  # tied: the one table is read as head
    blocks = sum(p.numel() for n, p in bundle.model.named_parameters() if "proj" in n) * 4
    by_name = {(r["variant"], r["sparsity"]): r for r in swept["rows"]}
    saved = swept["dense"]["bytes_per_token"] - by_name["topk", 0.5]["bytes_per_token"]
    assert saved == pytest.approx(0.5 * blocks, rel=0.02)
    extra = by_name["larosa", 0.5]["bytes_per_token"] - by_name["topk", 0.5]["bytes_per_token"]
    assert by_name["larosa", 0.5]["adapter_bytes"] == 64 * 64 * 4
    assert abs(extra - 64 * 64 * 4) < 0.01 * blocks
    assert by_name["one_rotation", 0.5]["adapter_bytes"] == 0


@pytest.mark.parametrize(("wrong", "error", "said"), [
    ({"sparsities": (1.0,)}, InvalidRequest, "sparsity is 1.0"),
    ({"variants": ("dejavu",)}, InvalidRequest, "choose one of"),
    ({"sparsities": ()}, InvalidRequest, "nothing to do"),
    ({"texts": ["short"]}, CalibrationError, "To score on: The calibration text has"),
])
def test_bad_input_is_refused(wrong: dict[str, Any], error: type[FuseboxError], said: str, llama: Bundle) -> None:
    texts = wrong.pop("texts", TEXTS)
    with pytest.raises(error, match=said):
        sweep(llama, texts, tokens=256, **wrong)


def test_model_that_admits_no_rotation_is_refused(family_bundle: Callable[[str], Bundle]) -> None:
    with pytest.raises(UnsupportedModel, match="behind the residual sums"):
        sweep(family_bundle("opt_post_norm"), TEXTS, tokens=64)


def test_figure_shows_every_variant(swept: dict[str, Any], tmp_path: Path) -> None:
    figure = quality_against_bytes(swept, "tiny")
    assert len(figure.axes[0].get_legend().get_texts()) == len(VARIANTS)
    for ending in ("png", "svg"):
        save_figure(figure, tmp_path / f"f.{ending}")
        assert (tmp_path / f"f.{ending}").stat().st_size > 5000


def test_held_out_project_texts_are_enough_to_score() -> None:
    assert sum(len(t.split()) for t in held_out_project_texts()) > 2500


def test_command_writes_json_and_figure(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXTS[0])
    result = CliRunner().invoke(app, [
        "bench", "larosa", "--model", str(family_checkpoint("llama")), "--variant", "topk", "--variant", "larosa", "--text", str(tmp_path / "text.txt"),
        "--tokens", "128", "--calibration-tokens", "1024", "--json", str(tmp_path / "out.json"), "--figure", str(tmp_path / "out.png"),
        "--sparsity", "0", "0.4",
    ])
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out.json").read_text())
    assert [(r["variant"], r["sparsity"]) for r in data["rows"]] == [("topk", 0.0), ("topk", 0.4), ("larosa", 0.0), ("larosa", 0.4)]
    assert data["provenance"]["packages"]["torch"] and data["model"]["dtype"] == "float32" and data["text"] == "text.txt"
    assert "MiB/token" in result.output and (tmp_path / "out.png").stat().st_size > 5000


@pytest.mark.parametrize(("arguments", "said"), [
    (["--sparsity", "nan"], "sparsity is nan"),
    (["--sparsity", "-0.5"], "sparsity is -0.5"),
    (["--sparsity", "1"], "sparsity is 1"),
    (["--variant", "magic"], "variant is 'magic'"),
    (["--text", "missing.txt"], "missing.txt cannot be read"),
    (["--json", "nowhere/out.json"], "there is no folder nowhere"),
    (["--calibration-tokens", "3"], "calibration_tokens is 3"),
])
def test_command_refuses_bad_input_in_words(arguments: list[str], said: str, family_checkpoint: Callable[[str], Path]) -> None:
    result = CliRunner().invoke(app, ["bench", "larosa", "--model", str(family_checkpoint("llama")), *arguments])
    assert isinstance(result.exception, FuseboxError) and said in str(result.exception)
