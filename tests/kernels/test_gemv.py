"""Matrix times vector in C against float64 in torch, over odd shapes and every choice of input channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.build import native
from kernels.channels import above, largest, largest_reference, nonzero
from kernels.gemv import gemv, gemv_reference
from kernels.packing import KINDS, TILE, pack, quantize_int4, quantize_int8, unpack
from tests.tolerances import SUM_ORDER


@pytest.fixture(autouse=True)
def compiled() -> None:
    if native().library is None:
        pytest.skip(f"NOT RUN: {native().reason}")


def vectors(inside: int, out: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, x, bias = torch.randn(out, inside, generator=generator), torch.randn(inside, generator=generator), torch.randn(out, generator=generator)
    return weight / inside**0.5, x, bias


@settings(max_examples=120)
@given(st.sampled_from(KINDS), st.integers(1, 300), st.integers(1, 400), st.sampled_from([1, 5, 32, 64]), st.booleans(), st.integers(0, 99))
def test_dense_product_equals_the_reference(kind: str, inside: int, out: int, group: int, with_bias: bool, seed: int) -> None:
    weight, x, bias = vectors(inside, out, seed)
    packed = pack(weight, kind, group)
    chosen = bias if with_bias else None
    assert SUM_ORDER.holds(gemv(x, packed, chosen), gemv_reference(x, packed, chosen))


@settings(max_examples=120)
@given(st.sampled_from(KINDS), st.integers(1, 300), st.integers(1, 300), st.floats(0, 1), st.integers(0, 99))
def test_some_channels_equal_the_reference_and_the_rest_is_not_read(kind: str, inside: int, out: int, share: float, seed: int) -> None:
    weight, x, bias = vectors(inside, out, seed)
    packed = pack(weight, kind, 32)
    rows = (torch.rand(inside, generator=torch.Generator().manual_seed(seed)) < share).nonzero()[:, 0].int()
    wanted = gemv_reference(x, packed, bias, rows)
    poisoned = x.clone()
    poisoned[torch.ones(inside, dtype=torch.bool).index_fill(0, rows.long(), False)] = torch.nan
    assert SUM_ORDER.holds(gemv(poisoned, packed, bias, rows), wanted)
    together = packed.rows_together()
    assert torch.equal(unpack(together), unpack(packed))
    assert SUM_ORDER.holds(gemv(poisoned, together, bias, rows), wanted)
    assert SUM_ORDER.holds(gemv(x, together, bias), gemv_reference(x, packed, bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [[], [0], [199], [0, 199], list(range(200))])
def test_no_one_and_all_channels(kind: str, rows: list[int]) -> None:
    weight, x, bias = vectors(200, 3 * TILE + 1, 0)
    packed = pack(weight, kind, 64)
    assert SUM_ORDER.holds(gemv(x, packed, bias, torch.tensor(rows, dtype=torch.int32)), gemv_reference(x, packed, bias, torch.tensor(rows, dtype=torch.int32)))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weight_is_near_the_original_and_as_small_as_it_says(kind: str) -> None:
    weight, _, _ = vectors(192, 256, 1)
    packed = pack(weight, kind, 64)
    error = float((unpack(packed) - weight).abs().max() / weight.abs().max())
    assert error <= {"float32": 0, "bfloat16": 2**-8, "int8": 1 / 254, "int4": 1 / 4}[kind] * 1.01
    assert packed.nbytes == {"float32": 4 * 192 * 256, "bfloat16": 2 * 192 * 256, "int8": 192 * 256 + 4 * 256, "int4": 96 * 256 + 2 * 3 * 256}[kind]


def test_quantisers_are_symmetric_and_keep_zero_rows() -> None:
    weight = torch.cat([torch.zeros(1, 70), torch.linspace(-3, 3, 70)[None]])
    for codes, scale in (quantize_int8(weight), quantize_int4(weight, 64)):
        assert (codes[0] == 0).all() and torch.isfinite(scale).all()
    codes = quantize_int8(weight)[0]
    assert torch.equal(codes[1].flip(0)[:6], -codes[1][:6])
    assert int(codes.max()) == 127 and int(quantize_int4(weight, 64)[0].max()) == 7


def test_int4_scales_leave_less_error_than_the_largest_magnitude_does() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_int4(weight, 64)
    grouped = weight.reshape(64, 4, 64)
    plain = grouped.abs().amax(-1, keepdim=True) / 7
    error = (codes.reshape(64, 4, 64) * scale.float()[..., None] - grouped).square().mean()
    assert error < 0.95 * ((grouped / plain).round() * plain - grouped).square().mean()


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 1e-40, -3e38, 0.1]), min_size=1, max_size=40), st.integers(-1, 45))
def test_largest_is_the_stable_sort(values: list[float], keep: int) -> None:
    x = torch.tensor(values)
    assert torch.equal(largest(x, keep), largest_reference(x, keep))


@pytest.mark.parametrize("n", [1, 2, 15, 320, 896, 5632])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_largest_of_random_vectors(n: int, share: float) -> None:
    x = torch.randn(n)
    assert torch.equal(largest(x, round(share * n)), largest_reference(x, round(share * n)))


def test_above_and_nonzero() -> None:
    x = torch.tensor([0.0, -2.0, 0.5, -0.0, 1.0, 1.5])
    assert above(x, 1.0).tolist() == [1, 5]
    assert nonzero(x).tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize(("wrong", "said"), [
    ({"x": torch.zeros(9)}, r"x is torch.float32 \(9,\)"),
    ({"x": torch.zeros(8, dtype=torch.float64)}, "x is torch.float64"),
    ({"x": torch.zeros(16)[::2]}, "contiguous"),
    ({"bias": torch.zeros(3)}, "bias is"),
    ({"out": torch.zeros(3)}, "out is"),
    ({"rows": torch.tensor([0, 8], dtype=torch.int32)}, "ascend within 0 to 7"),
    ({"rows": torch.tensor([-1, 2], dtype=torch.int32)}, "ascend within"),
    ({"rows": torch.tensor([3, 3], dtype=torch.int32)}, "at most once"),
    ({"rows": torch.tensor([5, 2, 6], dtype=torch.int32)}, "ascend"),
    ({"rows": torch.tensor([1, 2])}, "rows is torch.int64"),
])
def test_what_does_not_fit_is_refused_before_c_sees_it(wrong: dict[str, Tensor], said: str) -> None:
    packed = pack(torch.zeros(4, 8), "int8")
    with pytest.raises(ValueError, match=said):
        gemv(**{"x": torch.zeros(8), "weight": packed, **wrong})


@pytest.mark.parametrize(("kind", "group"), [("int3", 64), ("int4", 0)])
def test_unknown_kinds_are_refused(kind: str, group: int) -> None:
    with pytest.raises(ValueError, match="kind is"):
        pack(torch.zeros(4, 8), kind, group)
