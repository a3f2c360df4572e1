"""The point of the rotation: at equal bytes of the blocks it costs less than its rivals, on models that really are trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from core.bundle import Bundle
from core.calibration import calibration_windows
from core.loading import load_bundle
from engines.larosa_sweep import held_out_project_texts
from optim.larosa.allocation import sparse_loss
from optim.larosa.sites import counting, measured, sites_of
from optim.larosa.structure import structure_of
from optim.larosa.technique import LaRoSA


def loss_and_sparsity(bundle: Bundle, technique: LaRoSA, texts: Sequence[str] | None, windows: Sequence[Tensor]) -> tuple[float, float]:
    with technique.apply(bundle, technique.prepare(bundle, texts)):
        sites, structure = sites_of(bundle.model), structure_of(bundle.model, "test")
        with counting(sites):
            loss = sparse_loss(structure, sites, windows, technique.exempt)
        sparsity = measured(structure, sites).sparsity
    assert sparsity is not None
    return loss, sparsity


def check_beats_rivals(bundle: Bundle, sparsity: float, texts: Sequence[str] | None, windows: Sequence[Tensor], calibration_tokens: int) -> None:
    found = {
        v: loss_and_sparsity(bundle, LaRoSA(sparsity=sparsity, variant=v, calibration_tokens=calibration_tokens), texts, windows) for v in ("larosa", "topk", "teal")
    }
    ours, left_out = found["larosa"]
    assert left_out == pytest.approx(sparsity, abs=0.005)
    for rival in ("topk", "teal"):
        loss, rivals_share = found[rival]
        assert rivals_share <= left_out + 0.005, f"{rival} leaves out more, so the losses cannot be compared"
        assert ours < loss, f"at {sparsity:.0%} LaRoSA costs {ours:.4f} nats, {rival} {loss:.4f}"


@pytest.mark.parametrize("sparsity", [0.4, 0.5])
def test_rotation_beats_unrotated_rivals_on_stories(sparsity: float, stories260k: Bundle, shared: Callable[..., Path]) -> None:
    stories = json.loads(shared("data", "tinystories", "tinystories_700.json").read_text())
    windows = calibration_windows(stories260k, stories[500:], 4096, 512)
    check_beats_rivals(stories260k, sparsity, stories[:400], windows, 8192)


@pytest.mark.parametrize("sparsity", [0.4, 0.5])
def test_rotation_beats_unrotated_rivals_on_the_embedded_model(sparsity: float) -> None:
    bundle = load_bundle("embedded", dtype="float32")
    check_beats_rivals(bundle, sparsity, None, calibration_windows(bundle, held_out_project_texts(), 2048, 512), 2048)
