"""The Triton kernels: by the interpreter where there is no CUDA device, on the device where there is one; and compiled for CUDA either way."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.channels import largest_reference
from kernels.cuda.executor import NoExecutor, SparseExecutor, sparse_executor
from tests.tolerances import ROUNDED_ONCE, SUM_ORDER

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="NOT RUN: Triton is not installed (Linux x86_64 only)")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROOT = Path(__file__).resolve().parent.parent.parent


def vectors(inside: int, out: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """weight [inside, out], x, bias."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(inside, out, generator=generator) / inside**0.5, torch.randn(inside, generator=generator), torch.randn(out, generator=generator)
    weight, x, bias = (part.to(dtype).to(DEVICE) for part in parts)
    return weight, x, bias


def holds(got: Tensor, wanted: Tensor) -> bool:
    """`wanted` is not rounded; `got` is summed in float32 and rounded once."""
    if got.dtype == torch.float32:
        return SUM_ORDER.holds(got, wanted)
    return bool(((got.double() - wanted).abs() <= ROUNDED_ONCE[DEVICE.type, got.dtype] * wanted.abs() + SUM_ORDER.atol).all())


@needs_triton
@settings(max_examples=60)
@given(
    st.sampled_from(DTYPES), st.integers(1, 300), st.integers(1, 300), st.floats(0, 1), st.sampled_from(["largest", "above", "nonzero"]), st.sampled_from([None, 1, 2, 5]),
    st.booleans(), st.integers(0, 99),
)
def test_product_over_chosen_channels_equals_the_reference_and_the_rest_is_not_read(
    dtype: torch.dtype, inside: int, out: int, share: float, rule: str, splits: int | None, with_bias: bool, seed: int,
) -> None:
    from kernels.cuda.selection import above, largest, nonzero
    from kernels.cuda.sparse_gemv import sparse_gemv, sparse_gemv_reference

    weight, x, bias = vectors(inside, out, seed, dtype)
    keep = round(share * inside)
    rows = largest_reference(x.float(), keep)
    edge = float(x.abs().float().sort(descending=True).values[keep]) if keep < inside else -1.0
    if rule != "largest":
        rows = (x.abs().float() > edge).nonzero()[:, 0]
    masked = torch.zeros_like(x).index_copy(0, rows.long(), x[rows.long()])
    selection = {"largest": lambda: largest(x, keep), "above": lambda: above(x, edge), "nonzero": lambda: nonzero(masked)}[rule]()
    if rule == "nonzero":
        rows = masked.nonzero()[:, 0]
    assert selection.rows[: int(selection.count)].tolist() == rows.tolist() and len(rows) <= selection.most
    assert torch.equal(selection.kept, masked)
    wanted = sparse_gemv_reference(weight, x, rows, bias if with_bias else None)
    weight[torch.ones(inside, dtype=torch.bool, device=DEVICE).index_fill(0, rows.long(), False)] = torch.nan
    assert holds(sparse_gemv(weight, selection, bias if with_bias else None, splits), wanted)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [0, 1, 199, 200, 250, -3])
def test_no_one_and_all_channels(dtype: torch.dtype, keep: int) -> None:
    from kernels.cuda.selection import largest
    from kernels.cuda.sparse_gemv import sparse_gemv, sparse_gemv_reference

    weight, x, bias = vectors(200, 129, 0, dtype)
    rows = largest_reference(x.float(), keep)
    assert len(rows) == min(max(keep, 0), 200)
    selection = largest(x, keep)
    assert selection.rows[: int(selection.count)].tolist() == rows.tolist()
    assert holds(sparse_gemv(weight, selection, bias), sparse_gemv_reference(weight, x, rows, bias))
    if not len(rows):
        assert torch.equal(sparse_gemv(weight, selection), torch.zeros_like(bias))


@needs_triton
@given(st.sampled_from(DTYPES), st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 1e-6, -6e4, 0.1, float("inf")]), min_size=1, max_size=40), st.integers(-1, 45))
def test_largest_is_the_stable_sort(dtype: torch.dtype, values: list[float], keep: int) -> None:
    from kernels.cuda.selection import largest

    x = torch.tensor(values, dtype=dtype, device=DEVICE)
    selection = largest(x, keep)
    assert selection.rows[: int(selection.count)].tolist() == largest_reference(x.float(), keep).tolist()


@needs_triton
def test_thresholds_round_and_treat_nan_as_torch_does() -> None:
    from kernels.cuda.selection import above, largest, nonzero

    x = torch.tensor([1.0, 1.0078125, torch.nan, -2.0, 0.0], device=DEVICE)
    for dtype in DTYPES:
        for threshold in (1.0, 1.005, 1.004, 0.0):
            chosen = x.to(dtype).abs() > threshold
            assert above(x.to(dtype), threshold).rows[: int(chosen.sum())].tolist() == chosen.nonzero()[:, 0].tolist()
        assert int(nonzero(x.to(dtype)).count) == 4
        assert largest(x.to(dtype), 1).rows[0] == 2, "a NaN is not hidden"


@needs_triton
def test_results_do_not_depend_on_the_run() -> None:
    from kernels.cuda.selection import largest
    from kernels.cuda.sparse_gemv import sparse_gemv

    weight, x, bias = vectors(300, 260, 3, torch.float32)
    first = sparse_gemv(weight, largest(x, 170), bias, 5)
    assert all(torch.equal(sparse_gemv(weight, largest(x, 170), bias, 5), first) for _ in range(3))


@needs_triton
def test_a_selection_knows_its_vector() -> None:
    from kernels.cuda.selection import largest

    x = torch.randn(1, 1, 8, device=DEVICE)
    selection = largest(x, 3)
    assert selection.kept.shape == x.shape and selection.is_of(selection.kept.reshape(8))
    assert not selection.is_of(x) and not selection.is_of(selection.kept[..., :4]) and not selection.is_of(selection.kept.clone())


@needs_triton
@pytest.mark.parametrize(("change", "said"), [
    ({"weight": torch.zeros(8, 4, dtype=torch.float64)}, "weight is torch.float64"),
    ({"weight": torch.zeros(4, 8).T}, "contiguous"),
    ({"weight": torch.zeros(9, 4)}, r"x is torch.float32 \(8,\).*must have 9 entries"),
    ({"weight": torch.zeros(8, 4, dtype=torch.float16)}, "x is torch.float32"),
    ({"bias": torch.zeros(3)}, r"bias is \(3,\)"),
    ({"bias": torch.zeros(8, device=DEVICE)[::2]}, "bias is"),
])
def test_what_does_not_fit_is_refused_before_the_kernel_sees_it(change: dict[str, Tensor], said: str) -> None:
    from kernels.cuda.selection import largest
    from kernels.cuda.sparse_gemv import sparse_gemv

    moved = {name: tensor.to(DEVICE) for name, tensor in change.items()}
    with pytest.raises(ValueError, match=said):
        sparse_gemv(**{"weight": torch.zeros(8, 4, device=DEVICE), "selection": largest(torch.zeros(8, device=DEVICE), 2), **moved})


@needs_triton
@pytest.mark.parametrize("x", [torch.zeros(4, dtype=torch.float64), torch.zeros(8, device=DEVICE)[::2], torch.zeros(0)])
def test_vectors_that_the_kernels_cannot_read_are_refused(x: Tensor) -> None:
    from kernels.cuda.selection import above, largest, nonzero

    for rule in (lambda: largest(x.to(DEVICE), 1), lambda: above(x.to(DEVICE), 0.5), lambda: nonzero(x.to(DEVICE))):
        with pytest.raises(ValueError, match="contiguous vector"):
            rule()


@needs_triton
def test_kernels_compile_for_cuda() -> None:
    """The interpreter runs what the compiler refuses. Triton brings ptxas along, so no device and no CUDA toolkit is needed."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-m", "tests.kernels.compile_triton", "90"], capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("cubin") == 14, ran.stdout


def test_other_devices_have_no_executor_and_no_excuse() -> None:
    for kind in ("cpu", "mps"):
        assert sparse_executor(kind, torch.device("cpu")) == NoExecutor(None)


def test_without_triton_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kernels.cuda.selection", "kernels.cuda.sparse_gemv"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(f"kernels.cuda.{name.rpartition('.')[2]}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    found = sparse_executor("cuda", torch.device("cpu"))
    assert isinstance(found, NoExecutor) and found.reason is not None and found.reason.startswith("Triton is not installed")


@needs_triton
def test_a_triton_that_does_not_work_is_found_out_by_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(sparse_executor("cuda", DEVICE), SparseExecutor)

    def broken(*args: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nSecond line")

    monkeypatch.setattr("kernels.cuda.sparse_gemv.sparse_gemv", broken)
    assert sparse_executor("cuda", DEVICE) == NoExecutor("Triton does not work here (RuntimeError: Failed to find C compiler.)")
    monkeypatch.setattr("kernels.cuda.sparse_gemv.sparse_gemv", lambda weight, selection, bias: torch.zeros(1))
    assert "came out as" in str(sparse_executor("cuda", DEVICE))
