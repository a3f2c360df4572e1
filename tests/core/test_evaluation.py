"""Quality figures: scored token by token as decode runs, equal to independent computations and to published ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from compression.quant.technique import BnbNf4
from core.architectures import FAMILIES
from core.bundle import Bundle
from core.errors import InvalidRequest
from core.evaluation import EXEMPT_POSITIONS, Score, agreement, decode_logits, score_continuation, score_text, wilson_interval
from core.progress import Stop
from core.reversible import Edits
from tests import contract
from tests.known import known_bug
from tests.tolerances import PRINTED_3, PUBLISHED_NLL, SUM_ORDER

BundleOf = Callable[[str], Bundle]
TEXT = "A language model predicts the next word from the words before it."


def nll_without_cache(bundle: Bundle, ids: list[int], first: int) -> float:
    """Sum of -log p of ids[first:], one whole forward without a cache per token, softmax in float64 written out."""
    total = 0.0
    for place in range(first, len(ids)):
        with torch.inference_mode():
            row = bundle.model(input_ids=torch.tensor([ids[:place]]), use_cache=False).logits[0, -1].double()
        total -= float(row[ids[place]] - row.max() - (row - row.max()).exp().sum().log())
    return total


def nll_teacher_forced(bundle: Bundle, ids: list[int], first: int) -> float:
    with torch.inference_mode():
        logits = bundle.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, first - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[first:]), reduction="sum"))


def ids_of(bundle: Bundle, text: str) -> list[int]:
    return [bundle.tokenizer.bos_token_id, *bundle.tokenizer(text, add_special_tokens=False)["input_ids"]]


def close(a: float, b: float, tokens: int) -> bool:
    return abs(a - b) <= tokens * (SUM_ORDER.atol + SUM_ORDER.rtol * abs(b) / tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt_post_norm", "gpt_neox"])
def test_score_equals_log_softmax_token_by_token(family: str, family_bundle: BundleOf) -> None:
    bundle = family_bundle(family)
    ids = ids_of(bundle, TEXT)
    score = score_text(bundle, TEXT)
    assert score.tokens == len(ids) - EXEMPT_POSITIONS
    assert close(score.nll, nll_without_cache(bundle, ids, EXEMPT_POSITIONS), score.tokens)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_score_of_a_plain_model_equals_teacher_forcing(family: str, family_bundle: BundleOf) -> None:
    bundle = family_bundle(family)
    score = score_text(bundle, TEXT)
    assert close(score.nll, nll_teacher_forced(bundle, ids_of(bundle, TEXT), EXEMPT_POSITIONS), score.tokens)


def test_score_takes_a_technique_as_decode_does_where_a_prefill_does_not(llama: Bundle) -> None:
    """A hook that acts on single tokens only stands for any technique that leaves the prefill dense."""
    plain = score_text(llama, TEXT)
    edits = Edits()
    edits.add_hook(llama.model.model.norm.register_forward_hook, lambda module, args, output: output * 0.5 if output.shape[1] == 1 else output)
    ids = ids_of(llama, TEXT)
    assert close(nll_teacher_forced(llama, ids, EXEMPT_POSITIONS), plain.nll, plain.tokens)
    assert abs(score_text(llama, TEXT).nll - plain.nll) > 0.01 * plain.nll
    edits.undo()
    assert score_text(llama, TEXT) == plain


def test_score_of_a_lossy_technique_differs_from_dense_and_is_its_own_decode(llama: Bundle) -> None:
    dense = score_text(llama, TEXT)
    with contract.apply(BnbNf4(), llama):
        score = score_text(llama, TEXT)
        assert close(score.nll, nll_without_cache(llama, ids_of(llama, TEXT), EXEMPT_POSITIONS), score.tokens)
    assert abs(score.nll - dense.nll) > 1e-2


@pytest.mark.parametrize("exempt", [0, 1, 2, 7])
def test_exempt_positions_are_prefilled_and_not_scored(exempt: int, llama: Bundle) -> None:
    ids = ids_of(llama, TEXT)
    lengths: list[int] = []
    llama.model.get_input_embeddings().register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    score = score_text(llama, TEXT, exempt=exempt)
    prefilled = max(1, exempt)
    assert lengths[0] == prefilled and set(lengths[1:]) == {1}
    assert score.tokens == len(ids) - prefilled
    assert close(score.nll, nll_teacher_forced(llama, ids, prefilled), score.tokens)


@pytest.mark.parametrize("tokens", [1, 5])
def test_scoring_n_tokens_takes_n_forwards(tokens: int, llama: Bundle) -> None:
    calls: list[int] = []
    llama.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    decode_logits(llama, [5, 6], [7] * tokens)
    assert len(calls) == tokens


def test_decode_logits_are_float32_rows_before_each_token(llama: Bundle) -> None:
    llama.model.to(torch.bfloat16)
    rows = decode_logits(llama, [5, 6], [7, 8, 9])
    assert rows.shape == (3, len(llama.tokenizer)) and rows.dtype == torch.float32
    with torch.inference_mode():
        first = llama.model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].float()
    assert torch.equal(rows[0], first)


def test_decode_logits_of_no_tokens_has_no_rows(llama: Bundle) -> None:
    assert decode_logits(llama, [5], []).shape[0] == 0


def test_decode_logits_use_the_bundles_cache(llama: Bundle) -> None:
    made: list[object] = []

    def factory() -> object:
        from transformers import DynamicCache

        made.append(DynamicCache())
        return made[-1]

    llama.cache_factory = factory
    decode_logits(llama, [5, 6], [7, 8])
    assert len(made) == 1 and made[0].get_seq_length() >= 3  # type: ignore[attr-defined]


def test_scoring_without_a_first_token_is_refused(llama: Bundle) -> None:
    with pytest.raises(InvalidRequest, match="at least one token"):
        decode_logits(llama, [], [5])


def test_nothing_to_score_is_a_score_of_nothing(llama: Bundle) -> None:
    score = score_continuation(llama, [5], [])
    assert score == Score(0.0, 0, 0) and score.bits_per_byte is None and score.perplexity is None
    assert score_text(llama, "") == Score(0.0, 0, 0)


def test_stop_ends_scoring_early_with_what_was_scored(llama: Bundle) -> None:
    stop, calls = Stop(), []

    def hook(module: object, args: object, output: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            stop.request()  # in the middle of the fourth forward: its logits are not used

    llama.model.model.norm.register_forward_hook(hook)
    continuation = llama.tokenizer("one two three four five")["input_ids"]
    score = score_continuation(llama, [5], continuation, stop)
    assert score.tokens == 3 < len(continuation)
    assert score.text_bytes == len(llama.tokenizer.decode(continuation[:3]).encode())


def test_texts_longer_than_max_tokens_are_cut(llama: Bundle) -> None:
    ids = ids_of(llama, TEXT)
    score = score_text(llama, TEXT, max_tokens=10)
    assert score.tokens == 10 - EXEMPT_POSITIONS
    assert close(score.nll, nll_teacher_forced(llama, ids[:10], EXEMPT_POSITIONS), score.tokens)


def test_texts_longer_than_the_context_are_cut_to_it(family_bundle: BundleOf) -> None:
    bundle = family_bundle("gpt2")
    score = score_text(bundle, TEXT * 6)
    assert score.tokens == bundle.context_length - EXEMPT_POSITIONS


def test_bytes_are_those_of_the_scored_text(llama: Bundle) -> None:
    prefix, continuation = llama.tokenizer("Let me say: ")["input_ids"], "naïve café, 日本"
    score = score_continuation(llama, prefix, llama.tokenizer(continuation)["input_ids"])
    assert score.text_bytes == len(continuation.encode())


@known_bug("half a character at the edge decodes to a replacement character of three bytes")
def test_bytes_of_text_cut_inside_a_character_are_those_of_its_tokens(llama: Bundle) -> None:
    ids = llama.tokenizer("日本語")["input_ids"]  # one token a byte: the tiny vocabulary has never seen these
    assert len(ids) == 9
    assert score_continuation(llama, ids[:4], ids[4:]).text_bytes == 5


def test_bits_per_byte_and_perplexity_follow_from_the_sums() -> None:
    score = Score(nll=10 * math.log(8), tokens=10, text_bytes=15)
    assert score.bits_per_byte == pytest.approx(2.0) and score.perplexity == pytest.approx(8.0)
    assert Score(1e6, 1, 1).perplexity == math.exp(700)


def test_scores_add_up() -> None:
    assert Score(1.0, 2, 3) + Score(10.0, 20, 30) == Score(11.0, 22, 33)


# The really trained model.


def test_stories_greedy_decode_equals_the_published_tokens(stories260k: Bundle, shared: Callable[..., Path]) -> None:
    expected = json.loads(shared("models", "stories260K", "expected.json").read_text())["bos_greedy"]
    ids = expected["ids"]
    assert expected["prompt_ids"] == ids[:1]
    chosen = decode_logits(stories260k, ids[:1], ids[1:]).argmax(-1)  # each is the greedy choice: so is the whole row
    assert chosen.tolist() == ids[1:]
    assert stories260k.tokenizer.decode(ids, skip_special_tokens=True) == expected["text"]


def test_stories_greedy_decode_of_a_prompt_equals_the_published_tokens(stories260k: Bundle, shared: Callable[..., Path]) -> None:
    expected = json.loads(shared("models", "stories260K", "expected.json").read_text())["prompt_greedy"]
    prompt = [stories260k.tokenizer.bos_token_id, *stories260k.tokenizer(expected["prompt"], add_special_tokens=False)["input_ids"]]
    assert prompt == expected["prompt_ids"]
    rest = expected["ids"][len(prompt) :]
    assert decode_logits(stories260k, prompt, rest).argmax(-1).tolist() == rest


def test_stories_mean_nll_equals_the_published_one(stories260k: Bundle, shared: Callable[..., Path]) -> None:
    """All 100 stories in batches, teacher-forced; the same number that token-by-token scoring gives (next test)."""
    expected = json.loads(shared("models", "stories260K", "expected.json").read_text())["nll"]
    stories = json.loads(shared("data", "tinystories", "tinystories_700.json").read_text())[: expected["first_stories"]]
    rows = [ids_of(stories260k, story)[: expected["max_tokens_per_story"]] for story in stories]
    rows.sort(key=len)
    total, count = 0.0, 0
    for start in range(0, len(rows), 20):
        part = rows[start : start + 20]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in part], batch_first=True, padding_value=-100)
        with torch.inference_mode():
            logits = stories260k.model(input_ids=ids.clamp(min=0), use_cache=False).logits
        total += float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100, reduction="sum"))
        count += sum(len(r) - 1 for r in part)
    assert count == expected["tokens_scored"]
    assert abs(total / count - expected["mean_nll_per_token"]) <= PUBLISHED_NLL.atol


def test_stories_score_is_a_trained_models_score_and_equals_teacher_forcing(stories260k: Bundle, shared: Callable[..., Path]) -> None:
    story = json.loads(shared("data", "tinystories", "tinystories_700.json").read_text())[0][:200]
    score = score_text(stories260k, story, exempt=1)
    assert close(score.nll, nll_teacher_forced(stories260k, ids_of(stories260k, story), 1), score.tokens)
    assert score.text_bytes == len(story.encode())
    assert 0.5 < score.bits_per_byte < 1.5


# Statistics.


@pytest.mark.parametrize(("successes", "trials", "low", "high"), [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 1, 0.2065, 1.0), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
])
def test_wilson_interval_equals_known_values(successes: int, trials: int, low: float, high: float) -> None:
    """The last two rows are Newcombe 1998, table I, method 3; the first are from the formula's tables at 95 %."""
    got = wilson_interval(successes, trials)
    assert abs(got[0] - low) <= PRINTED_3.atol and abs(got[1] - high) <= PRINTED_3.atol


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share_and_is_symmetric(counts: tuple[int, int]) -> None:
    successes, trials = counts
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials + 1e-12 and successes / trials - 1e-12 <= high <= 1 and low < high
    mirrored = wilson_interval(trials - successes, trials)
    assert low == pytest.approx(1 - mirrored[1], abs=1e-9) and high == pytest.approx(1 - mirrored[0], abs=1e-9)
    wider = wilson_interval(successes, trials, z=2.576)
    assert wider[0] <= low + 1e-12 and wider[1] >= high - 1e-12


def test_wilson_interval_of_no_trials_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one trial"):
        wilson_interval(0, 0)


@pytest.mark.parametrize(("reference", "candidate", "expected"), [
    ([1, 2, 3], [1, 2, 3], (3, 1.0)), ([1, 2, 3, 4], [1, 2, 9, 4], (2, 0.5)), ([1, 2], [1, 2, 3, 4], (2, 0.5)), ([1], [2], (0, 0.0)),
    ([], [1], (0, 0.0)), ([], [], (0, None)),
])
def test_agreement_counts_tokens_until_they_part(reference: list[int], candidate: list[int], expected: tuple[int, float | None]) -> None:
    assert agreement(reference, candidate) == expected
    assert agreement(candidate, reference) == expected


def test_agreement_of_two_decodes_tells_a_lossy_technique_from_none(llama: Bundle, tokenizer: PreTrainedTokenizerBase) -> None:
    def greedy() -> list[int]:
        ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
        return llama.model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()

    plain = greedy()
    assert agreement(plain, greedy()) == (24, 1.0)
    with contract.apply(BnbNf4(), llama):
        shared_tokens, share = agreement(plain, greedy())
    assert shared_tokens < 24 and share == shared_tokens / 24
