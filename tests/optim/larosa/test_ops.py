"""Rotations, Top-K and budgets against naive references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim.larosa.ops import (
    fold_gain,
    keep_above,
    keep_counts,
    keep_largest,
    remove_output_mean,
    rotate_reader,
    rotate_writer,
    rotation_of,
    second_moment,
    site_sparsities,
)


def test_rotation_is_orthogonal_and_sorts_by_energy() -> None:
    x = torch.randn(500, 24) * torch.linspace(0.1, 3, 24)
    moment = second_moment(x)
    assert torch.allclose(moment, x.double().T @ x.double(), rtol=1e-5, atol=1e-3)
    rotation = rotation_of(moment)
    assert float((rotation.T @ rotation - torch.eye(24)).abs().max()) < 1e-12
    energy = (x.double() @ rotation).square().sum(0)
    assert torch.equal(energy.argsort(descending=True), torch.arange(24))


def test_second_moment_is_not_centred() -> None:
    assert torch.equal(second_moment(torch.full((10, 2), 3.0)), torch.full((2, 2), 90.0, dtype=torch.float64))


@given(st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=4), st.integers(0, 7))
def test_keep_largest_keeps_exactly_so_many_and_the_largest(rows: list[list[int]], keep: int) -> None:
    x = torch.tensor(rows, dtype=torch.float32) + 0.5  # no zeros, many ties
    kept = keep_largest(x, keep)
    assert (kept != 0).sum(-1).eq(keep).all()
    assert torch.equal(kept[kept != 0], x[kept != 0])
    for row, original in zip(kept, x, strict=True):
        if 0 < keep < 7:
            assert row[row != 0].abs().min() >= original[row == 0].abs().max()


def test_keep_above_keeps_what_is_larger() -> None:
    assert keep_above(torch.tensor([-2.0, 0.5, 1.0, 1.5]), 1.0).tolist() == [-2.0, 0.0, 0.0, 1.5]


@given(
    st.floats(0, 0.95),
    st.lists(st.tuples(st.floats(0.05, 20), st.floats(0.01, 1)), min_size=1, max_size=5),
)
def test_site_sparsities_have_the_wanted_weighted_mean(sparsity: float, kinds: list[tuple[float, float]]) -> None:
    total = sum(share for _, share in kinds)
    multipliers = {str(i): m for i, (m, _) in enumerate(kinds)}
    shares = {str(i): share / total for i, (_, share) in enumerate(kinds)}
    found = site_sparsities(sparsity, multipliers, shares)
    assert set(found) == set(multipliers)
    assert all(0 <= v <= 0.99 + 1e-9 for v in found.values())
    assert sum(shares[k] * v for k, v in found.items()) == pytest.approx(sparsity, abs=1e-9)


@given(st.floats(0, 0.99), st.lists(st.integers(8, 400), min_size=1, max_size=40))
def test_keep_counts_add_up_to_within_one_entry(sparsity: float, widths: list[int]) -> None:
    kept = keep_counts(sparsity, widths)
    assert all(1 <= k <= w for k, w in zip(kept, widths, strict=True))
    if (1 - sparsity) * min(widths) >= 2:
        assert abs(sum(kept) - (1 - sparsity) * sum(widths)) <= 1


def test_folding_and_rotating_leave_the_function_as_it_is() -> None:
    torch.manual_seed(1)
    weight, bias, gain, shift, x = torch.randn(5, 8).double(), torch.randn(5).double(), torch.randn(8).double(), torch.randn(8).double(), torch.randn(3, 8).double()
    rotation = rotation_of(second_moment(torch.randn(50, 8)))
    folded, moved = fold_gain(weight, bias, gain, shift)
    assert moved is not None
    wanted = (x * gain + shift) @ weight.T + bias
    assert torch.allclose(x @ folded.T + moved, wanted)
    assert torch.allclose((x @ rotation) @ rotate_reader(folded, rotation).T + moved, wanted)
    writer, writer_bias = torch.randn(8, 5).double(), torch.randn(8).double()
    turned, turned_bias = rotate_writer(writer, writer_bias, rotation)
    y = torch.randn(3, 5).double()
    assert turned_bias is not None
    assert torch.allclose(y @ turned.T + turned_bias, (y @ writer.T + writer_bias) @ rotation)
    centred, centred_bias = remove_output_mean(writer, writer_bias)
    assert centred_bias is not None
    out = y @ writer.T + writer_bias
    assert torch.allclose(y @ centred.T + centred_bias, out - out.mean(-1, keepdim=True))
