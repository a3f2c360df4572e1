"""Many tokens times packed weights in C against float64 in torch: odd shapes, every kind and layout, with and without bfloat16 products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernels.build import native
from kernels.gemm import WAYS, bf16_way, gemm, gemm_reference
from kernels.packed_linear import PackedLinear
from kernels.packing import KINDS, TILE, PackedWeight, pack
from tests.tolerances import BF16_OUTPUT, BF16_WEIGHTS, SUM_ORDER, Tolerance

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def compiled() -> None:
    if native().library is None:
        pytest.skip(f"NOT RUN: {native().reason}")


def tensors(tokens: int, inside: int, out: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((tokens, inside), (out, inside), (out,)))
    return x.to(dtype), weight / inside**0.5, bias


def cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().split() if info.is_file() else []


def tolerance(kind: str, dtype: torch.dtype) -> Tolerance:
    if dtype == torch.float32:
        return SUM_ORDER
    return BF16_OUTPUT if kind in ("bfloat16", "int8") else BF16_WEIGHTS


def assert_equal(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> None:
    wanted, bound = gemm_reference(x, packed, bias), tolerance(packed.kind, x.dtype)
    for layout in (packed, packed.rows_together()):
        found = gemm(x, layout, bias)
        assert found.dtype == x.dtype and bound.holds(found, wanted), f"{packed.kind} by_row={layout.by_row}: {float((found - wanted).abs().max())} apart"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(DTYPES), st.integers(1, 70), st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 5, 32, 64]), st.booleans(), st.integers(0, 99))
def test_product_equals_the_reference(kind: str, dtype: torch.dtype, tokens: int, inside: int, out: int, group: int, with_bias: bool, seed: int) -> None:
    x, weight, bias = tensors(tokens, inside, out, dtype, seed)
    assert_equal(x, pack(weight, kind, group), bias if with_bias else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inside", "out"), [(1, 1, 1), (5, 1, TILE + 1), (4, 641, 33), (6, 641, 31), (17, 1281, 200), (33, 1300, 2 * TILE), (512, 640, 64)])
def test_product_over_several_depths_and_edges_equals_the_reference(kind: str, dtype: torch.dtype, tokens: int, inside: int, out: int) -> None:
    x, weight, bias = tensors(tokens, inside, out, dtype)
    assert_equal(x, pack(weight, kind, 48), bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3, 5])
def test_threads_do_not_change_a_bit(kind: str, dtype: torch.dtype, threads: int) -> None:
    x, weight, bias = tensors(37, 700, 150, dtype)
    packed, before = pack(weight, kind), torch.get_num_threads()
    wanted = gemm(x, packed, bias)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(gemm(x, packed, bias), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens_are_no_rows(dtype: torch.dtype) -> None:
    assert gemm(torch.zeros(0, 8, dtype=dtype), pack(torch.zeros(4, 8), "int8")).shape == (0, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [3, 20])
def test_rows_of_zeros_and_infinite_entries_stay_in_their_token(kind: str, tokens: int) -> None:
    for dtype in DTYPES:
        x, weight, bias = tensors(tokens, 70, 40, dtype)
        clean = gemm(x, pack(weight, kind), bias)
        x[1] = 0
        x[2, 5] = torch.inf
        found = gemm(x, pack(weight, kind), bias)
        assert torch.equal(found[1], bias.to(dtype)) and not found[2].isfinite().all()
        others = [0, *range(3, tokens)]
        assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_prompt_in_pieces_is_the_same_to_the_last_bit_above_four_tokens(kind: str) -> None:
    """Each token's sums are taken in the same order whatever stands beside it; up to four tokens another kernel takes them."""
    for dtype in DTYPES:
        x, weight, bias = tensors(64, 1500, 130, dtype)
        packed = pack(weight, kind)
        whole = gemm(x, packed, bias)
        for start, end in ((0, 5), (5, 37), (37, 64)):
            assert torch.equal(gemm(x[start:end].contiguous(), packed, bias), whole[start:end])
        assert tolerance(kind, dtype).holds(gemm(x[:3].contiguous(), packed, bias), whole[:3])


@pytest.mark.parametrize(("march", "flag"), [("cooperlake", "avx512_bf16"), ("x86-64-v3", "avx2")])
def test_older_cpus_multiply_the_same(march: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if flag not in cpu_flags():
        pytest.skip(f"NOT RUN: this CPU has no {flag}")
    monkeypatch.setenv("FUSEBOX_CACHE", str(tmp_path))
    monkeypatch.setenv("FUSEBOX_MARCH", march)
    assert native().library is not None
    assert bf16_way() == (WAYS[1] if march == "cooperlake" else WAYS[0])
    for kind in KINDS:
        for dtype in DTYPES:
            for tokens, inside, out in ((3, 70, 130), (5, 33, 31), (40, 1290, 150)):
                x, weight, bias = tensors(tokens, inside, out, dtype)
                assert_equal(x, pack(weight, kind, 32), bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (1, 1, 70), (2, 9, 70)])
def test_layer_in_c_equals_the_layer_in_torch(kind: str, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight, bias = tensors(1, 70, 50, dtype)
    layer = PackedLinear(pack(weight, kind, 32), bias.to(dtype))
    x = torch.randn(*shape[:-1], 70, generator=torch.Generator().manual_seed(3)).to(dtype)
    ours = layer(x)
    monkeypatch.setenv("FUSEBOX_NATIVE", "0")
    theirs = layer(x)
    assert ours.shape == theirs.shape == (*shape[:-1], 50) and ours.dtype == theirs.dtype == dtype
    assert (SUM_ORDER if dtype == torch.float32 else BF16_WEIGHTS).holds(ours, theirs)


def test_layer_passes_gradients_on_and_takes_other_dtypes() -> None:
    _, weight, bias = tensors(1, 70, 50, torch.float32)
    layer = PackedLinear(pack(weight, "int8"), bias)
    x = torch.randn(6, 70, requires_grad=True)
    layer(x).sum().backward()
    wanted = torch.autograd.grad(nn.functional.linear(x, gemm_reference(torch.eye(70), layer.packed).T).sum(), x)[0]
    assert x.grad is not None and SUM_ORDER.holds(x.grad, wanted)
    assert layer(x.detach().double()).dtype == torch.float64


@pytest.mark.parametrize(("wrong", "said"), [
    ({"x": torch.zeros(2, 9)}, r"x is torch.float32 \(2, 9\)"),
    ({"x": torch.zeros(8)}, r"x is torch.float32 \(8,\)"),
    ({"x": torch.zeros(2, 8, dtype=torch.float16)}, "x is torch.float16"),
    ({"x": torch.zeros(2, 16)[:, ::2]}, "contiguous"),
    ({"x": torch.zeros(2, 8, device="meta")}, "on meta"),
    ({"bias": torch.zeros(3)}, "bias is"),
    ({"bias": torch.zeros(4, dtype=torch.bfloat16)}, "bias is torch.bfloat16"),
])
def test_what_does_not_fit_is_refused_before_c_sees_it(wrong: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gemm(**{"x": torch.zeros(2, 8), "weight": pack(torch.zeros(4, 8), "int8"), **wrong})


def test_without_the_library_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEBOX_NATIVE", "0")
    x, weight, bias = tensors(6, 40, 30, torch.bfloat16)
    packed = pack(weight, "int4", 32)
    assert torch.equal(gemm(x, packed, bias), gemm_reference(x, packed, bias)) and bf16_way() == "torch"

