"""linear_cross_entropy against torch: value and both gradients, any chunking, ignored positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from core.losses import IGNORE, linear_cross_entropy
from tests.tolerances import BF16_AUTOCAST, SUM_ORDER


def sample(rows: int, vocab: int = 37, width: int = 8, ignored: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, requires_grad=True)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[torch.randperm(rows, generator=generator)[:ignored]] = IGNORE
    return hidden, weight, labels


def by_torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE)


@given(rows=st.integers(1, 40), chunk=st.integers(1, 50), ignored=st.integers(0, 39), seed=st.integers(0, 5))
def test_value_and_gradients_equal_torch(rows: int, chunk: int, ignored: int, seed: int) -> None:
    hidden, weight, labels = sample(rows, ignored=min(ignored, rows - 1), seed=seed)
    ours = linear_cross_entropy(hidden, weight, labels, chunk)
    wanted = by_torch(hidden, weight, labels)
    assert ours.shape == () and SUM_ORDER.holds(ours.detach(), wanted.detach())
    for got, want in zip(torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(wanted, (hidden, weight)), strict=True):
        assert SUM_ORDER.holds(got, want)


def test_ignored_rows_have_no_gradient() -> None:
    hidden, weight, labels = sample(9, ignored=4)
    linear_cross_entropy(hidden, weight, labels, 4).backward()
    assert torch.equal(hidden.grad.abs().sum(1) == 0, labels == IGNORE)


def test_nothing_scored_is_zero_with_zero_gradients() -> None:
    hidden, weight, labels = sample(5, ignored=5)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert float(loss.detach()) == 0.0 and not hidden.grad.any() and not weight.grad.any()


def test_gradients_scale_with_what_comes_after() -> None:
    hidden, weight, labels = sample(12)
    plain = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    scaled = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) * 3, (hidden, weight))
    assert all(torch.allclose(3 * a, b) for a, b in zip(plain, scaled, strict=True))


def test_gradients_reach_what_made_the_hidden_states() -> None:
    hidden, weight, labels = sample(12)
    first = torch.randn(8, 8, requires_grad=True)
    ours = torch.autograd.grad(linear_cross_entropy(hidden @ first, weight, labels, 5), first)[0]
    assert SUM_ORDER.holds(ours, torch.autograd.grad(by_torch(hidden @ first, weight, labels), first)[0])


def test_inputs_are_not_changed() -> None:
    hidden, weight, labels = sample(12, ignored=2)
    copies = [t.detach().clone() for t in (hidden, weight, labels)]
    linear_cross_entropy(hidden, weight, labels, 5).backward()
    assert all(torch.equal(a, b) for a, b in zip((hidden, weight, labels), copies, strict=True))


def test_large_logits_stay_finite_and_exact() -> None:
    hidden, weight, labels = sample(12)
    with torch.no_grad():
        hidden *= 300
    ours = linear_cross_entropy(hidden, weight, labels, 5)
    ours.backward()
    assert SUM_ORDER.holds(ours.detach(), by_torch(hidden, weight, labels).detach()) and hidden.grad.isfinite().all()


def test_bf16_autocast_stays_near_fp32_and_gives_gradients_in_the_inputs_dtype() -> None:
    hidden, weight, labels = sample(40, width=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, labels, 16)
    wanted = by_torch(hidden, weight, labels)
    assert ours.dtype == torch.float32 and BF16_AUTOCAST.holds(ours.detach(), wanted.detach())
    assert float(ours.detach()) != float(wanted.detach())  # autocast did take place
    for got, want in zip(torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(wanted, (hidden, weight)), strict=True):
        assert got.dtype == torch.float32 and BF16_AUTOCAST.holds(got, want)


@pytest.mark.parametrize("chunk", [1, 7, 12, 100])
def test_chunking_does_not_matter(chunk: int) -> None:
    hidden, weight, labels = sample(12)
    assert SUM_ORDER.holds(linear_cross_entropy(hidden, weight, labels, chunk).detach(), linear_cross_entropy(hidden, weight, labels, 12).detach())


def test_no_more_than_a_chunk_of_logits_is_held() -> None:
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == 1000:
                seen.append(out.shape[0])
            return out

    hidden, weight, labels = sample(64, vocab=1000)
    with Watch():
        linear_cross_entropy(hidden, weight, labels, 16).backward()
    assert seen and max(seen) <= 16
