"""Norms, rotary positions, activations and one-token attention in C against torch and transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kernels.attention import attention, attention_reference
from kernels.build import native
from kernels.elementwise import ACTIVATIONS, activate, norm, norm_reference, rope, rope_reference
from tests.tolerances import SUM_ORDER


@pytest.fixture(autouse=True)
def compiled() -> None:
    if native().library is None:
        pytest.skip(f"NOT RUN: {native().reason}")


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 5), st.integers(1, 200), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 9))
def test_norm_equals_the_reference(segments: int, n: int, centre: bool, with_gain: bool, with_shift: bool, seed: int) -> None:
    x, gain, shift = seeded(segments, n, seed=seed) + 0.5, seeded(n, seed=seed + 1), seeded(n, seed=seed + 2)
    arguments: Any = (x, gain if with_gain else None, shift if with_shift else None, 1e-5)
    assert SUM_ORDER.holds(norm(*arguments, centre=centre), norm_reference(*arguments, centre=centre))


def test_norm_is_that_of_torch() -> None:
    x, gain, shift = seeded(3, 64), seeded(64, seed=1), seeded(64, seed=2)
    assert SUM_ORDER.holds(norm(x, gain, shift, 1e-5, centre=True), torch.nn.functional.layer_norm(x, (64,), gain, shift, 1e-5))
    assert SUM_ORDER.holds(norm(x, gain, None, 1e-6, centre=False), torch.nn.functional.rms_norm(x, (64,), gain, 1e-6))


@pytest.mark.parametrize(("dim", "turned"), [(32, 32), (80, 32), (64, 2), (16, 16)])
def test_rope_is_that_of_transformers(dim: int, turned: int) -> None:
    x = seeded(6, dim)
    angles = torch.arange(turned // 2) * 0.37 + 1.0
    ours = rope(x, angles.cos(), angles.sin())
    assert SUM_ORDER.holds(ours, rope_reference(x, angles.cos(), angles.sin()))
    full = torch.cat([angles, angles])[None, None]
    theirs, _ = apply_rotary_pos_emb(x[None, :, None, :turned], x[None, :, None, :turned], full.cos(), full.sin())
    assert SUM_ORDER.holds(ours[:, :turned], theirs[0, :, 0]) and torch.equal(ours[:, turned:], x[:, turned:])


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("with_gate", [False, True])
def test_activations_are_those_of_torch(kind: str, with_gate: bool) -> None:
    x = torch.cat([seeded(301) * 4, torch.tensor([0.0, -0.0, 60.0, -60.0, 1e4, -1e4])])
    gated = seeded(307, seed=3) if with_gate else None
    wanted = ACTIVATIONS[kind][1](x) * (gated if with_gate else 1.0)
    assert SUM_ORDER.holds(activate(x, kind, gated), wanted)
    if kind == "relu":
        assert torch.equal(activate(x, kind) == 0, x <= 0), "zeros of a ReLU must be exact"


@given(
    st.sampled_from([(1, 1, 1), (4, 4, 4), (8, 2, 2), (6, 2, 6), (6, 1, 3)]), st.sampled_from([1, 8, 17, 32, 80]), st.integers(1, 70), st.integers(0, 9),
)
def test_attention_equals_the_reference(heads: tuple[int, int, int], dim: int, tokens: int, seed: int) -> None:
    q_heads, key_heads, value_heads = heads
    q, keys, values = seeded(q_heads, dim, seed=seed), seeded(tokens + 3, key_heads, dim, seed=seed + 1), seeded(tokens + 3, value_heads, dim, seed=seed + 2)
    wanted = attention_reference(q, keys[:tokens], values[:tokens], 0.3)
    values[tokens:] = keys[tokens:] = torch.nan  # beyond the length nothing is read
    assert SUM_ORDER.holds(attention(q, keys, values, 0.3, length=tokens), wanted)


@pytest.mark.parametrize("dim", [16, 33, 64, 128, 200])
def test_attention_reads_half_precision_and_int8(dim: int) -> None:
    q, keys, values = seeded(4, dim), seeded(50, 2, dim, seed=1), seeded(50, 4, dim, seed=2)
    k16, v16 = keys.bfloat16(), values.bfloat16()
    assert SUM_ORDER.holds(attention(q, k16, v16, dim**-0.5), attention_reference(q, k16.float(), v16.float(), dim**-0.5))
    k_scale, v_scale = keys.abs().amax(-1) / 127, values.abs().amax(-1) / 127
    k8, v8 = (keys / k_scale[..., None]).round().to(torch.int8), (values / v_scale[..., None]).round().to(torch.int8)
    wanted = attention_reference(q, k8 * k_scale[..., None], v8 * v_scale[..., None], dim**-0.5)
    assert SUM_ORDER.holds(attention(q, k8, v8, dim**-0.5, key_scales=k_scale, value_scales=v_scale), wanted)


def test_attention_is_that_of_torch_and_sees_only_its_window() -> None:
    q, keys, values = seeded(8, 32), seeded(40, 2, 32, seed=1), seeded(40, 2, 32, seed=2)
    theirs = torch.nn.functional.scaled_dot_product_attention(q[None, :, None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None], enable_gqa=True)
    assert SUM_ORDER.holds(attention(q, keys, values, 32**-0.5), theirs[0, :, 0])
    assert SUM_ORDER.holds(attention(q, keys, values, 0.2, window=7), attention_reference(q, keys[-7:], values[-7:], 0.2))
    assert SUM_ORDER.holds(attention(100 * q, keys, values, 1.0), attention_reference(100 * q, keys, values, 1.0)), "large scores overflow"


@pytest.mark.parametrize(("call", "said"), [
    (lambda: norm(seeded(2, 8), seeded(7), None, 1e-5, centre=False), "gain has 7 entries; it must have 8"),
    (lambda: norm(seeded(2, 8).double(), None, None, 1e-5, centre=False), "x is torch.float64"),
    (lambda: rope(seeded(2, 8), seeded(5), seeded(5)), "R <= D"),
    (lambda: activate(seeded(8), "swish"), "the activation is 'swish'"),
    (lambda: activate(seeded(8), "silu", seeded(9)), "gated has 9"),
    (lambda: attention(seeded(3, 8), seeded(4, 2, 8), seeded(4, 2, 8), 1.0), "do not fit"),
    (lambda: attention(seeded(4, 8), seeded(4, 2, 8), seeded(4, 2, 8), 1.0, length=5), "over 5 tokens"),
    (lambda: attention(seeded(4, 8), seeded(4, 2, 8).to(torch.int8), seeded(4, 2, 8).to(torch.int8), 1.0), "int8 needs key_scales"),
    (lambda: attention(seeded(4, 8), seeded(4, 2, 8), seeded(4, 2, 8).bfloat16(), 1.0), "do not fit"),
    (lambda: attention(seeded(4, 8), seeded(4, 2, 8), seeded(4, 2, 8), 1.0, length=0), "over 0 tokens"),
])
def test_what_does_not_fit_is_refused_before_c_sees_it(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_torch_serves_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gain = seeded(2, 8), seeded(8)
    angles = torch.arange(4) * 0.1
    keys = seeded(5, 2, 8)
    native_results = [norm(x, gain, None, 1e-5, centre=True), rope(x, angles.cos(), angles.sin()), activate(gain, "gelu", gain), attention(x, keys, keys, 0.5, window=3)]
    monkeypatch.setenv("FUSEBOX_NATIVE", "0")
    torch_results = [norm(x, gain, None, 1e-5, centre=True), rope(x, angles.cos(), angles.sin()), activate(gain, "gelu", gain), attention(x, keys, keys, 0.5, window=3)]
    for ours, theirs in zip(native_results, torch_results, strict=True):
        assert SUM_ORDER.holds(ours, theirs)
