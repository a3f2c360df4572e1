"""Sampling settings from anybody, and the tokens they choose, against an independent numpy implementation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.errors import InvalidRequest
from engines.sampling import MAX_NEW_TOKENS, Sampler, Sampling, sampling_from

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")
NOT_A_NUMBER = (NAN, INF, -INF, "abc", "3", "", None, True, False, [1], {"a": 1}, 10**400, -(10**400))
BAD: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (0, -1, 1e9, 10**9, 3.7, MAX_NEW_TOKENS + 1, *NOT_A_NUMBER),
    "temperature": (-1, -0.001, 1e9, 5.1, *NOT_A_NUMBER),
    "top_p": (0, 0.0, -1, 1.5, 3.7, 1e9, *NOT_A_NUMBER),
    "top_k": (-1, 1e9, 10**9, 3.7, *NOT_A_NUMBER),
    "repetition_penalty": (0, -1, 0.49, 3.7, 1e9, *NOT_A_NUMBER),
    "seed": (-1, 2**63, 2**64, 3.7, *NOT_A_NUMBER),
    "ignore_eos": (0, 1, -1, 1e9, 3.7, NAN, INF, "abc", "false", "", None, [1], {"a": 1}),
}
GOOD: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (1, MAX_NEW_TOKENS),
    "temperature": (0, 0.0, 1, 5.0),
    "top_p": (1e-6, 0.9, 1),
    "top_k": (0, 1, 10**6),
    "repetition_penalty": (0.5, 1, 3.0),
    "seed": (0, 2**63 - 1),
    "ignore_eos": (True, False),
}


def spellings(value: Any) -> tuple[str, ...]:
    """How a message may show a value: as typed, an unfilled field in words, a huge one cut."""
    if value is None:
        return ("empty",)
    if isinstance(value, float) and value.is_integer():
        return f"{value:g}", str(int(value)), repr(value)
    return (repr(value)[:20],)


@pytest.mark.parametrize("make", [lambda name, value: Sampling(**{name: value}), lambda name, value: sampling_from({name: value})], ids=["direct", "from a form"])
@pytest.mark.parametrize("name", BAD)
def test_bad_value_is_refused_by_name_and_value(make: Any, name: str) -> None:
    wrong = {}
    for value in BAD[name]:
        try:
            make(name, value)
            wrong[repr(value)[:20]] = "taken"
        except InvalidRequest as refusal:
            message = str(refusal)
            if not message.startswith(f"{name} is ") or not any(text in message for text in spellings(value)) or len(message) > 200:
                wrong[repr(value)[:20]] = message[:300]
        except Exception as error:  # the point of the test: nothing but InvalidRequest may come
            wrong[repr(value)[:20]] = f"{type(error).__name__}: {error}"
    assert wrong == {}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD.items() for v in values])
def test_value_at_the_edge_of_its_range_is_taken(name: str, value: Any) -> None:
    assert getattr(Sampling(**{name: value}), name) == value


@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "seed"])
def test_form_may_send_whole_numbers_as_floats(name: str) -> None:
    value = getattr(sampling_from({name: 7.0}), name)
    assert value == 7
    assert type(value) is int
    with pytest.raises(InvalidRequest, match=name):
        Sampling(**{name: 7.0})


def test_form_keeps_defaults_of_missing_fields() -> None:
    assert sampling_from({}) == Sampling()
    assert sampling_from({"temperature": 1}) == Sampling(temperature=1)


@pytest.mark.parametrize("name", ["temprature", "", "__class__", "x" * 1000])
def test_unknown_setting_is_refused_and_the_known_ones_listed(name: str) -> None:
    with pytest.raises(InvalidRequest, match="repetition_penalty") as refusal:
        sampling_from({name: 1})
    assert repr(name[:40]) in str(refusal.value)
    assert len(str(refusal.value)) < 300


def draws(sampling: Sampling, logits: torch.Tensor, count: int, prompt: tuple[int, ...] = (0,), disturb: bool = False) -> list[int]:
    sampler = Sampler(sampling, prompt, CPU)
    ids = []
    for place in range(count):
        if disturb:
            torch.manual_seed(place)
            torch.rand(place + 1)
            np.random.seed(place)
        ids.append(sampler.next_token(logits))
    return ids


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(50, generator=torch.Generator().manual_seed(3)) * 2


def test_same_seed_agrees_when_global_randomness_is_disturbed(logits: torch.Tensor) -> None:
    sampling = Sampling(temperature=1.0, seed=11)
    with torch.random.fork_rng():
        assert draws(sampling, logits, 40) == draws(sampling, logits, 40, disturb=True)


def test_two_samplers_in_turn_draw_as_each_does_alone(logits: torch.Tensor) -> None:
    one, two = Sampling(temperature=1.0, seed=1), Sampling(temperature=1.0, seed=2)
    alone = draws(one, logits, 20), draws(two, logits, 20)
    a, b = Sampler(one, [0], CPU), Sampler(two, [0], CPU)
    turns = [(a.next_token(logits), b.next_token(logits)) for _ in range(20)]
    assert tuple(map(list, zip(*turns, strict=True))) == alone


def test_other_seed_draws_other_tokens(logits: torch.Tensor) -> None:
    assert draws(Sampling(temperature=1.0, seed=1), logits, 40) != draws(Sampling(temperature=1.0, seed=2), logits, 40)


def test_drawing_leaves_the_global_generator_untouched(logits: torch.Tensor) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draws(Sampling(temperature=1.0, top_k=5, top_p=0.9, repetition_penalty=1.2, seed=9), logits, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_logits_of_the_model_are_left_as_they_were(logits: torch.Tensor) -> None:
    given_logits = logits.clone()
    draws(Sampling(temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=2.0), given_logits, 5)
    assert torch.equal(given_logits, logits)


def test_temperature_zero_is_greedy_and_ignores_top_k_and_top_p(logits: torch.Tensor) -> None:
    best = int(logits.argmax())
    assert draws(Sampling(temperature=0, top_k=3, top_p=0.1, seed=4), logits, 5) == [best] * 5


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = np.exp(scores - scores.max())
    return shifted / shifted.sum()


def reference(logits: NDArray[np.float64], seen: set[int], sampling: Sampling) -> NDArray[np.float64]:
    """Probabilities by the papers' definitions: CTRL's penalty, then temperature, then top-k, then the nucleus."""
    scores = logits.astype(np.float64).copy()
    for token in seen:
        scores[token] = scores[token] / sampling.repetition_penalty if scores[token] > 0 else scores[token] * sampling.repetition_penalty
    probabilities = softmax(scores / sampling.temperature)
    if sampling.top_k:
        kept = np.argsort(-probabilities)[: sampling.top_k]
        probabilities = np.where(np.isin(np.arange(len(scores)), kept), probabilities, 0.0)
        probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        order = np.argsort(-probabilities)
        needed = int(np.searchsorted(np.cumsum(probabilities[order]), sampling.top_p)) + 1  # the fewest that reach top_p
        probabilities = np.where(np.isin(np.arange(len(scores)), order[:needed]), probabilities, 0.0)
        probabilities /= probabilities.sum()
    return probabilities


def probabilities_of(sampling: Sampling, logits: torch.Tensor, prompt: tuple[int, ...]) -> NDArray[np.float64]:
    """What the sampler hands to the draw."""
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda p, n, generator=None: seen.append(p.clone()) or torch.tensor([0]))
        Sampler(sampling, prompt, CPU).next_token(logits)
    return seen[0].double().numpy()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.1, 5.0),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1.0),
    penalty=st.floats(0.5, 3.0),
    prompt=st.lists(st.integers(0, 39), min_size=1, max_size=20),
)
def test_probabilities_equal_the_numpy_reference(seed: int, temperature: float, top_k: int, top_p: float, penalty: float, prompt: list[int]) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 3
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    expected = reference(logits.double().numpy(), set(prompt), sampling)
    got = probabilities_of(sampling, logits, tuple(prompt))
    # Where the nucleus ends within float32 of top_p, one token more or less is right.
    if (np.count_nonzero(got) == np.count_nonzero(expected)) or not _ends_on_the_edge(expected, sampling):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def _ends_on_the_edge(expected: NDArray[np.float64], sampling: Sampling) -> bool:
    return math.isclose(expected[expected > 0].min() * sampling.top_p, 0, abs_tol=1e-5) or sampling.top_p > 1 - 1e-5


@pytest.mark.parametrize(
    ("sampling", "support"),
    [
        (Sampling(temperature=1.0), 6),
        (Sampling(temperature=1.0, top_k=2), 2),
        (Sampling(temperature=1.0, top_p=0.75), 2),
        (Sampling(temperature=2.0, top_p=0.95), None),
        (Sampling(temperature=0.5, top_k=4, top_p=0.999), None),
    ],
)
def test_draws_follow_the_reference_frequencies(sampling: Sampling, support: int | None) -> None:
    """Black box: 1,000 draws lie within four standard errors, and never outside the support."""
    logits = torch.tensor([2.0, 1.5, 0.5, 0.0, -0.5, -1.0])
    expected = reference(logits.double().numpy(), set(), sampling)
    counts = np.bincount(draws(sampling, logits, 1000), minlength=6)
    error = np.sqrt(expected * (1 - expected) / 1000)
    assert (counts[expected == 0] == 0).all()
    assert (np.abs(counts / 1000 - expected) <= 4 * error + 1e-12).all()
    if support is not None:
        assert np.count_nonzero(counts) == support


def test_repetition_penalty_counts_the_answer_too() -> None:
    """Greedy over fixed logits: each chosen token is pushed below the next one."""
    logits = torch.tensor([3.0, 2.9, 2.8, -1.0])
    assert draws(Sampling(repetition_penalty=1.5), logits, 3, prompt=(3,)) == [0, 1, 2]


def test_repetition_penalty_counts_the_prompt() -> None:
    logits = torch.tensor([3.0, 2.9, 2.8, -1.0])
    assert draws(Sampling(repetition_penalty=1.5), logits, 1, prompt=(0, 1)) == [2]


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    logits = torch.linspace(-4, 4, 40).to(torch.bfloat16)
    sampling = Sampling(temperature=0.7)
    np.testing.assert_allclose(probabilities_of(sampling, logits, (0,)), reference(logits.double().numpy(), set(), sampling), atol=1e-6)
