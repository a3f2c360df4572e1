"""How the sparsity is spread over the kinds of sites: a search for the multipliers that cost least on calibration text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from core.errors import CalibrationError
from core.progress import Progress
from optim.larosa.modules import Site
from optim.larosa.sites import byte_shares, set_sparsity
from optim.larosa.structure import Structure

REFERENCE_SPARSITY = 0.5
STEPS = (0.25, 0.25, 0.12, 0.06)
"""Relative changes of one multiplier that each round of the search tries, up and down."""


@torch.inference_mode()
def sparse_logits(structure: Structure, sites: Sequence[Site], window: Tensor, exempt: int) -> Tensor:
    """Logits of a window with every token but the first `exempt` ones sparsified, as in decode.

    One forward call gives the same as token by token: sites work on each token alone.

    Args:
        window: [1, T] token ids.

    Returns:
        [T - max(1, exempt), vocab_size] float32: before each token that decode would have produced.
    """
    before = [site.prefill for site in sites]
    for site in sites:
        site.prefill = True
    try:
        logits: Tensor = structure.model(input_ids=window, use_cache=False).logits
        return logits[0, max(1, exempt) - 1 : -1].float()
    finally:
        for site, old in zip(sites, before, strict=True):
            site.prefill = old


def sparse_loss(structure: Structure, sites: Sequence[Site], windows: Sequence[Tensor], exempt: int) -> float:
    """Mean loss of windows under `sparse_logits`, nats per token."""
    losses = [cross_entropy(sparse_logits(structure, sites, w, exempt), w[0, max(1, exempt) :], reduction="none") for w in windows]
    return float(torch.cat(losses).mean())


def search_multipliers(
    structure: Structure, sites: Sequence[Site], windows: Sequence[Tensor], exempt: int, quantiles: Mapping[str, Tensor] | None, progress: Progress,
) -> tuple[dict[str, float], float, float]:
    """Coordinate search for each kind's multiplier at `REFERENCE_SPARSITY`, the byte-weighted mean kept.

    Source: LaRoSA, Algorithm 1 (grid search of the coefficients of a model). Deviates: every kind of site has its own.

    Returns:
        multipliers, the loss with them, and the loss with all of them at 1; nats per token.

    Raises:
        CalibrationError: the loss is not finite.
    """
    shares = byte_shares(sites)
    best = dict.fromkeys(shares, 1.0)

    def loss_of(multipliers: Mapping[str, float]) -> float:
        set_sparsity(sites, REFERENCE_SPARSITY, multipliers, quantiles)
        return sparse_loss(structure, sites, windows, exempt)

    uniform = lowest = loss_of(best)
    if not math.isfinite(uniform):
        raise CalibrationError(f"The model's loss on calibration text is {uniform} at sparsity {REFERENCE_SPARSITY}. Give other text, or check the model in float32.")
    if len(shares) == 1:
        return best, lowest, uniform
    for place, step in enumerate(STEPS):
        progress(place / len(STEPS), f"spreading the sparsity, round {place + 1} of {len(STEPS)}")
        for kind in shares:
            best, lowest = _improve(best, kind, step, lowest, loss_of)
    return best, lowest, uniform


def _improve(best: dict[str, float], kind: str, step: float, lowest: float, loss_of: Callable[[Mapping[str, float]], float]) -> tuple[dict[str, float], float]:
    for factor in (1 + step, 1 / (1 + step)):
        tried = {**best, kind: best[kind] * factor}
        loss = loss_of(tried)
        if loss < lowest:
            return tried, loss
    return best, lowest
