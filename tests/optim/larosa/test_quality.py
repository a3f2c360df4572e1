"""The point of the rotation: at equal bytes of the blocks it costs less than its rivals, on a model that really is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from core.bundle import Bundle
from core.calibration import calibration_windows
from optim.larosa.allocation import sparse_loss
from optim.larosa.sites import counting, measured, sites_of
from optim.larosa.structure import structure_of
from optim.larosa.technique import LaRoSA

SPARSITIES = (0.4, 0.5)


def losses(bundle: Bundle, variant: str, texts: Sequence[str] | None, windows: Sequence[Tensor], calibration_tokens: int) -> dict[float, tuple[float, float]]:
    """Sparsity asked for -> loss in nats and sparsity measured; one calibration serves all."""
    prepared = LaRoSA(variant=variant, calibration_tokens=calibration_tokens).prepare(bundle, texts)
    found = {}
    for asked in SPARSITIES:
        technique = LaRoSA(sparsity=asked, variant=variant, calibration_tokens=calibration_tokens)
        with technique.apply(bundle, prepared):
            sites, structure = sites_of(bundle.model), structure_of(bundle.model, "test")
            with counting(sites):
                loss = sparse_loss(structure, sites, windows, technique.exempt)
            left_out = measured(structure, sites).sparsity
        assert left_out is not None
        found[asked] = (loss, left_out)
    return found


def check_beats_rivals(bundle: Bundle, texts: Sequence[str] | None, windows: Sequence[Tensor], calibration_tokens: int) -> None:
    ours = losses(bundle, "larosa", texts, windows, calibration_tokens)
    for rival in ("topk", "teal"):
        for asked, (theirs, rivals_share) in losses(bundle, rival, texts, windows, calibration_tokens).items():
            loss, left_out = ours[asked]
            assert left_out == pytest.approx(asked, abs=0.005)
            assert rivals_share <= left_out + 0.005, f"{rival} leaves out more, so the losses cannot be compared"
            assert loss < theirs, f"at {asked:.0%} LaRoSA costs {loss:.4f} nats, {rival} {theirs:.4f}"


def test_rotation_beats_unrotated_rivals_on_stories(stories260k: Bundle, shared: Callable[..., Path]) -> None:
    stories = json.loads(shared("data", "tinystories", "tinystories_700.json").read_text())
    check_beats_rivals(stories260k, stories[:400], calibration_windows(stories260k, stories[500:], 4096, 512), 4096)
