"""Rotations, Top-K and budgets as pure functions on tensors.

B rows (tokens), D channels of a site's input, O outputs of a layer. Row vectors: y = x W^T with W [O, D].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def second_moment(x: Tensor) -> Tensor:
    """Uncentred second moment sum of rows, X^T X.

    Args:
        x: [B, D], any float dtype.

    Returns:
        [D, D] float64; products in float32.
    """
    rows = x.float()
    return (rows.T @ rows).double()


def rotation_of(moment: Tensor) -> Tensor:
    """Eigenvectors of a second moment as columns, largest eigenvalue first.

    Source: LaRoSA (arXiv 2507.01299), section 3.2. Deviates: no damping of the diagonal, which moves no eigenvector.

    Args:
        moment: [D, D] symmetric.

    Returns:
        Q [D, D] float64, Q^T Q = I.
    """
    _, vectors = torch.linalg.eigh(moment.double())
    return vectors.flip(-1)


def fold_gain(weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A reader's weight and bias after its norm gave up gain and shift: W diag(gain), b + W shift. float64.

    Args:
        weight: [O, D]. bias: [O] or None. gain: [D]. shift: [D], a LayerNorm's bias, or None.
    """
    wide = weight.double()
    moved = None if shift is None else wide @ shift.double()
    if bias is not None:
        moved = bias.double() if moved is None else moved + bias.double()
    return wide * gain.double(), moved


def remove_output_mean(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A writer whose outputs have mean zero over channels, so that a LayerNorm behind it needs no subtraction. float64."""
    wide = weight.double()
    return wide - wide.mean(0, keepdim=True), None if bias is None else bias.double() - bias.double().mean()


def rotate_reader(weight: Tensor, rotation: Tensor) -> Tensor:
    """W Q: reads what is written in the basis Q. [O, D] x [D, D] -> [O, D], float64, where the weight is."""
    return weight.double() @ rotation.to(weight.device).double()


def rotate_writer(weight: Tensor, bias: Tensor | None, rotation: Tensor) -> tuple[Tensor, Tensor | None]:
    """Q^T W and b Q: writes in the basis Q. W [D, I], float64, where the weight is."""
    turned = rotation.to(weight.device).double()
    return turned.T @ weight.double(), None if bias is None else bias.double() @ turned


def keep_largest(x: Tensor, keep: int) -> Tensor:
    """S_k of the paper: the `keep` entries of largest magnitude of each row stay, the others become zero.

    Args:
        x: [..., D]. keep: 0 to D; ties are broken by `torch.topk`, so exactly `keep` entries are chosen.
    """
    if keep >= x.shape[-1]:
        return x
    if keep <= 0:
        return torch.zeros_like(x)
    places = x.abs().topk(keep, dim=-1, sorted=False).indices
    return torch.zeros_like(x).scatter_(-1, places, x.gather(-1, places))


def keep_above(x: Tensor, threshold: float) -> Tensor:
    """Entries of magnitude above `threshold` stay, the others become zero (TEAL, arXiv 2408.14690, section 4.1)."""
    return torch.where(x.abs() > threshold, x, torch.zeros((), dtype=x.dtype, device=x.device))


def site_sparsities(sparsity: float, multipliers: Mapping[str, float], shares: Mapping[str, float], highest: float = 0.99) -> dict[str, float]:
    """Sparsity of each kind of site so that the byte-weighted mean is `sparsity`.

    Source: LaRoSA, section 3.4, k = alpha (1 - p) D with alpha a kind of site. Deviates: the paper's and the release's
    coefficients leave the byte-weighted mean below p; ours are scaled until it is p.

    Args:
        sparsity: wanted share of weight bytes not needed, in [0, 1).
        multipliers: relative sparsity of each kind, positive.
        shares: each kind's share of the weight bytes, summing to 1.
        highest: no kind goes beyond this; what it cannot take the others take over.
    """
    if sparsity > highest:
        raise ValueError(f"sparsity {sparsity} is above {highest}")
    fixed: dict[str, float] = {}
    while True:
        free = [kind for kind in multipliers if kind not in fixed]
        left = sparsity - sum(shares[k] * v for k, v in fixed.items())
        weight = sum(shares[k] * multipliers[k] for k in free)
        found = {k: max(0.0, left * multipliers[k] / weight) for k in free} if free else {}
        over = [k for k, v in found.items() if v > highest + 1e-12]
        if not over:
            return {**fixed, **found}
        fixed.update(dict.fromkeys(over, highest))


def keep_counts(sparsity: float, widths: Sequence[int]) -> list[int]:
    """Entries to keep at each of a row of like sites, rounded so that their sum is as exact as one entry allows.

    Args:
        sparsity: share of zeros, in [0, 1]. widths: channels of each site.
    """
    kept, wanted, given = [], 0.0, 0
    for width in widths:
        wanted += (1.0 - sparsity) * width
        count = min(width, max(1, round(wanted - given)))
        kept.append(count)
        given += count
    return kept
