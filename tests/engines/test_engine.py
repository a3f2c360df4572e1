"""Engines: what techniques change and leave alone, and every metric against an independent calculation."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from mmap import mmap
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import engines.engine as engine_module
from compression.quant.technique import BnbInt8, BnbNf4
from core.bundle import Bundle
from core.errors import IncompatibleTechniques, PromptTooLong, UnsupportedModel
from core.progress import Stop
from core.reversible import Edits
from core.technique import Effect, Label, Prepared, Report, Stage, Technique
from engines import generation
from engines.engine import Answer, Engine, baseline_engine, fused_engine
from engines.generation import Finished, GenerationEvent, Prefilled, TokenDecoded
from engines.metric_groups import GROUPS
from engines.metrics import ChatMetrics
from engines.prompting import Message
from engines.sampling import Sampling
from optim.word_removal.technique import WordRemoval

QUESTION: list[Message] = [{"role": "user", "content": "Please explain to me in a few simple words how the machines learn from examples"}]
FIXED = Sampling(max_new_tokens=10, ignore_eos=True)
HIDDEN, MLP, VOCAB, LAYERS, HEAD_DIM, HEADS, KV_HEADS = 64, 128, 384, 2, 16, 4, 2  # the tiny model of conftest.py
# Linear layers of one block as (out_features, in_features).
LINEARS = [(HIDDEN, HIDDEN), (KV_HEADS * HEAD_DIM, HIDDEN), (KV_HEADS * HEAD_DIM, HIDDEN), (HIDDEN, HIDDEN), (MLP, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP)]
LINEAR_BYTES = 4 * LAYERS * sum(o * i for o, i in LINEARS)


def ask(engine: Engine, sampling: Sampling = FIXED, messages: Sequence[Message] = QUESTION, on_text: Callable[[str], None] = lambda _: None) -> Answer:
    return engine.answer(messages, sampling, Stop(), on_text)


def logits_of(bundle: Bundle) -> torch.Tensor:
    with torch.inference_mode():
        return bundle.model(input_ids=torch.arange(3, 40)[None]).logits


@dataclass(frozen=True)
class Recording(Technique):
    """Notes the order of what happens to it, and fails where it is told to."""

    name: ClassVar[str] = "recording"
    title: ClassVar[str] = "Recording"
    summary: ClassVar[str] = ""
    effect: ClassVar[Effect] = Effect.LOSSY
    stage: ClassVar[Stage] = Stage.CACHE

    fails: ClassVar[str] = ""
    log: ClassVar[list[str]] = []

    def check(self, bundle: Bundle) -> None:
        self.log.append(f"{self.name}: check")
        if self.fails == "check":
            raise UnsupportedModel(f"{self.name} does not admit this model.")

    def prepare(self, bundle: Bundle, *args: Any, **kwargs: Any) -> Prepared:
        self.log.append(f"{self.name}: prepare")
        return Prepared()

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        self.log.append(f"{self.name}: apply")
        edits.set_attr(bundle, "prompt_filters", (str.upper,))
        edits.swap_module(bundle.model, "model.norm", nn.Identity())
        if self.fails == "apply":
            raise RuntimeError("broken in the middle")
        return Report(self.name, Label.EXECUTED, ("model.norm",)), ()


def state_of(bundle: Bundle) -> dict[str, Any]:
    """Everything a technique could have changed, by identity and by bits."""
    return {
        "modules": [(n, id(m), m.training) for n, m in bundle.model.named_modules()],
        "tensors": [(n, id(t), t.data_ptr(), t.clone()) for n, t in bundle.model.state_dict(keep_vars=True).items()],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bundle.model.modules()),
        "slots": (id(bundle.model), id(bundle.tokenizer), bundle.prompt_filters, bundle.cache_factory),
        "logits": logits_of(bundle),
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key in ("modules", "hooks", "slots"):
        assert before[key] == after[key], key
    for (name, *where, old), (_, *there, new) in zip(before["tensors"], after["tensors"], strict=True):
        assert where == there, name
        assert torch.equal(old, new), name
    assert torch.equal(before["logits"], after["logits"])


@pytest.mark.parametrize("techniques", [(WordRemoval(),), (BnbInt8(),), (BnbNf4(), WordRemoval()), (Recording(),)], ids=lambda t: "+".join(x.name for x in t))
def test_fused_engine_leaves_the_base_untouched(bundle: Bundle, techniques: tuple[Technique, ...]) -> None:
    before = state_of(bundle)
    engine = fused_engine(bundle, techniques)
    ask(engine)
    assert_same_state(before, state_of(bundle))
    assert engine.bundle is not bundle


def test_fused_engine_shares_the_storage_of_what_it_does_not_change(bundle: Bundle) -> None:
    fused = fused_engine(bundle, [BnbInt8(share=0.5)]).bundle
    base = {n: p.data_ptr() for n, p in bundle.model.named_parameters(remove_duplicate=False)}
    mine = {n: p.data_ptr() for n, p in fused.model.named_parameters(remove_duplicate=False)}
    changed = {n for n in base if mine[n] != base[n]}
    assert changed == {f"model.layers.0.{part}.weight" for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}


def test_engine_without_weight_techniques_costs_no_weights(bundle: Bundle) -> None:
    assert fused_engine(bundle, [WordRemoval()]).storages() == baseline_engine(bundle).storages()


def test_techniques_are_applied_in_stage_order_whatever_the_given_one(bundle: Bundle) -> None:
    engine = fused_engine(bundle, [Recording(), BnbInt8(), WordRemoval(every=4)])
    assert [r.technique for r in engine.reports] == ["word_removal", "bnb_int8", "recording"]
    assert engine.method == "word_removal:every=4+bnb_int8+recording"


@pytest.mark.parametrize("place", ["check", "apply"])
def test_failing_technique_leaves_the_base_untouched(bundle: Bundle, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recording, "fails", place)
    before = state_of(bundle)
    with pytest.raises((UnsupportedModel, RuntimeError)):
        fused_engine(bundle, [BnbInt8(), Recording()])
    assert_same_state(before, state_of(bundle))


def test_incompatible_techniques_are_refused_before_anything_is_done(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bundle, "clone", lambda self: pytest.fail("the bundle was copied"))
    with pytest.raises(IncompatibleTechniques):
        fused_engine(bundle, [BnbInt8(), BnbNf4()])


def test_progress_of_a_build_ends_at_one(bundle: Bundle) -> None:
    seen: list[float] = []
    fused_engine(bundle, [BnbInt8(), WordRemoval()], lambda fraction, text: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) >= 3


def test_answer_is_the_decoded_tokens_and_streams_as_such(shared_bundle: Bundle) -> None:
    pieces: list[str] = []
    answer = ask(baseline_engine(shared_bundle), on_text=pieces.append)
    assert "".join(pieces) == answer.text == shared_bundle.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert answer.method == "baseline"
    assert answer.reports == ()


def test_same_question_gives_the_same_answer(shared_bundle: Bundle) -> None:
    engine = baseline_engine(shared_bundle)
    sampling = replace(FIXED, temperature=1.0, seed=3)
    assert ask(engine, sampling).token_ids == ask(engine, sampling).token_ids
    assert ask(engine, sampling).token_ids != ask(engine, replace(sampling, seed=4)).token_ids


def test_int8_engine_answers_otherwise_than_the_baseline(bundle: Bundle) -> None:
    fused = fused_engine(bundle, [BnbInt8()])
    assert not torch.equal(logits_of(fused.bundle), logits_of(bundle))


# ---------------------------------------------------------------- metrics


def hand_bytes(bundle: Bundle) -> tuple[int, int]:
    """Bytes of the fp32 weights from the shapes alone, and of the rotary tables."""
    per_layer = sum(o * i for o, i in LINEARS) + 2 * HIDDEN
    tables = {b.data_ptr(): b.numel() * 4 for b in bundle.model.buffers()}
    return 4 * (VOCAB * HIDDEN + LAYERS * per_layer + HIDDEN), sum(tables.values())


def test_baseline_weights_are_counted_by_hand(bundle: Bundle) -> None:
    weights, tables = hand_bytes(bundle)
    metrics = ask(baseline_engine(bundle)).metrics
    assert metrics.weights_in_use_bytes == weights + tables  # tied embedding and head once
    assert metrics.weights_kept_for_undo_bytes == 0
    assert metrics.weights_packed_bytes == 0
    assert metrics.dtype == "float32"


def test_int8_weights_are_counted_by_hand(bundle: Bundle) -> None:
    weights, tables = hand_bytes(bundle)
    packed = LAYERS * sum(o * i + 4 * o for o, i in LINEARS)  # a byte a weight, a float a row
    metrics = ask(fused_engine(bundle, [BnbInt8()])).metrics
    assert metrics.weights_packed_bytes == packed
    assert metrics.weights_in_use_bytes == weights + tables - LINEAR_BYTES + packed
    assert metrics.weights_kept_for_undo_bytes == LINEAR_BYTES


def test_nf4_weights_lie_between_half_a_byte_a_weight_and_one(bundle: Bundle) -> None:
    metrics = ask(fused_engine(bundle, [BnbNf4()])).metrics
    assert metrics.weights_packed_bytes is not None
    assert LINEAR_BYTES / 8 < metrics.weights_packed_bytes < LINEAR_BYTES / 4
    assert metrics.weights_kept_for_undo_bytes == LINEAR_BYTES


def test_weights_do_not_grow_while_answering(bundle: Bundle) -> None:
    """A layer that unpacks itself at its first call would hold more than was reported; a few indices do not count."""
    for technique in (BnbInt8(), BnbNf4()):
        engine = fused_engine(bundle, [technique])
        before = sum(engine.storages().values())
        ask(engine)
        assert sum(engine.storages().values()) == pytest.approx(before, rel=0.001), technique.name


def test_kv_and_token_counts_are_those_of_the_answer(shared_bundle: Bundle) -> None:
    answer = ask(baseline_engine(shared_bundle))
    metrics = answer.metrics
    assert metrics.output_tokens == len(answer.token_ids) == 10
    assert metrics.output_chars == len(answer.text)
    assert metrics.prompt_tokens == metrics.prompt_tokens_unfiltered == len(answer.prompt.ids)
    assert metrics.kv_in_use_bytes == LAYERS * 2 * KV_HEADS * HEAD_DIM * 4 * (len(answer.prompt.ids) + 10 - 1)
    assert metrics.finish_reason == "length"
    assert metrics.times_comparable is True


def test_word_removal_gives_the_model_fewer_tokens_and_says_how_many_there_were(shared_bundle: Bundle) -> None:
    base, fused = ask(baseline_engine(shared_bundle)), ask(fused_engine(shared_bundle, [WordRemoval()]))
    assert fused.metrics.prompt_tokens is not None and fused.metrics.prompt_tokens_unfiltered is not None
    assert fused.metrics.prompt_tokens < fused.metrics.prompt_tokens_unfiltered == base.metrics.prompt_tokens
    assert fused.metrics.kv_in_use_bytes < base.metrics.kv_in_use_bytes  # type: ignore[operator]
    assert fused.metrics.prompt_tokens == len(fused.prompt.ids)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[GenerationEvent]:
    """The events that the engine gets from now on."""
    events: list[GenerationEvent] = []
    original = generation.generate

    def generate(*args: Any, **settings: Any) -> Iterator[GenerationEvent]:
        for event in original(*args, **settings):
            events.append(event)
            yield event

    monkeypatch.setattr(engine_module, "generate", generate)
    return events


def test_time_metrics_equal_a_recalculation_from_the_events(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    events = recorded(monkeypatch)
    answer = ask(baseline_engine(shared_bundle))
    metrics = answer.metrics
    times = np.array([e.at_s for e in events if isinstance(e, TokenDecoded)])
    prefilled = next(e for e in events if isinstance(e, Prefilled))
    gaps = times[1:] - times[:-1]
    assert metrics.ttft_s is not None and metrics.total_s is not None
    began = times[0] - metrics.ttft_s
    assert began < prefilled.began_s  # tokenising is part of the first token's time
    assert answer.gaps_s == pytest.approx(gaps, rel=1e-9)
    assert metrics.tpot_median_s == pytest.approx(np.median(gaps), rel=1e-9)
    assert metrics.tpot_p90_s == pytest.approx(np.percentile(gaps, 90), rel=1e-9)
    assert metrics.total_s == pytest.approx(times[-1] - began, rel=1e-9)
    assert metrics.prefill_tok_s == pytest.approx(len(answer.prompt.ids) / (prefilled.ended_s - prefilled.began_s), rel=1e-9)
    assert metrics.decode_tok_s == pytest.approx(9 / (times[-1] - times[0]), rel=1e-9)
    assert metrics.chars_s == pytest.approx(len(answer.text) / metrics.total_s, rel=1e-9)
    held = metrics.weights_in_use_bytes + metrics.kv_in_use_bytes  # type: ignore[operator]
    assert metrics.chars_s_per_gib == pytest.approx(metrics.chars_s * 2**30 / held, rel=1e-9)  # type: ignore[operator]


def fake_answer(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tokens: Sequence[tuple[int, float]], prefilled: bool = True, reason: str = "eos") -> Answer:
    """An answer of these tokens at these times; the engine's work began at second 100."""

    def generate(*_: object, **__: object) -> Iterator[GenerationEvent]:
        if prefilled:
            yield Prefilled(20, 100.5, 101.0)
        for token, at_s in tokens:
            yield TokenDecoded(token, at_s)
        yield Finished(reason, 1000 if prefilled else None, 2000 if prefilled else None, 1500 if prefilled else None)

    monkeypatch.setattr(engine_module, "generate", generate)
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(perf_counter=lambda: 100.0))
    return ask(baseline_engine(bundle))


def test_time_metrics_of_known_times(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    letter = shared_bundle.tokenizer.convert_tokens_to_ids("a")
    answer = fake_answer(shared_bundle, monkeypatch, [(letter, t) for t in (102.0, 102.5, 103.5, 106.0, 106.25)])
    metrics, prompt = answer.metrics, len(answer.prompt.ids)
    assert answer.text == "aaaaa"
    assert answer.gaps_s == (0.5, 1.0, 2.5, 0.25)
    assert (metrics.ttft_s, metrics.total_s, metrics.tpot_median_s) == (2.0, 6.25, 0.75)
    assert metrics.tpot_p90_s == pytest.approx(2.05)  # between 1.0 and 2.5, 7/10 of the way
    assert metrics.prefill_tok_s == prompt / 0.5
    assert metrics.decode_tok_s == 4 / 4.25
    assert metrics.chars_s == 5 / 6.25
    assert metrics.chars_s_per_gib == pytest.approx(5 / 6.25 * 2**30 / (metrics.weights_in_use_bytes + 1000))  # type: ignore[operator]
    assert (metrics.kv_in_use_bytes, metrics.kv_committed_bytes, metrics.kv_reserved_bytes) == (1000, 1500, 2000)


def unmeasured(metrics: ChatMetrics) -> set[str]:
    return {f.name for f in fields(ChatMetrics) if getattr(metrics, f.name) is None}


QUALITY = set(GROUPS["Quality"])  # added by whoever compares answers
OF_PAGES = set(GROUPS["KV pages"])  # of a reserved cache
OF_GAPS = {"tpot_median_s", "tpot_p90_s", "decode_tok_s"}
OF_TOKENS = {"ttft_s", "total_s", "chars_s", "chars_s_per_gib"}


def test_answer_of_one_token_has_no_time_between_tokens(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = fake_answer(shared_bundle, monkeypatch, [(70, 102.0)])
    assert unmeasured(answer.metrics) == QUALITY | OF_PAGES | OF_GAPS
    assert answer.metrics.ttft_s == answer.metrics.total_s == 2.0
    assert answer.metrics.output_tokens == 1


def test_answer_of_no_token_has_no_time_to_the_first_one(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = fake_answer(shared_bundle, monkeypatch, [])
    assert unmeasured(answer.metrics) == QUALITY | OF_PAGES | OF_GAPS | OF_TOKENS
    assert (answer.metrics.output_tokens, answer.metrics.output_chars, answer.text) == (0, 0, "")


def test_answer_stopped_in_the_prefill_has_no_times_at_all(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = fake_answer(shared_bundle, monkeypatch, [], prefilled=False, reason="stopped")
    assert unmeasured(answer.metrics) == QUALITY | OF_PAGES | OF_GAPS | OF_TOKENS | {"prefill_tok_s", "kv_in_use_bytes", "kv_committed_bytes", "kv_reserved_bytes"}
    assert answer.gaps_s == ()


def test_tokens_at_the_same_time_do_not_divide_by_zero(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = fake_answer(shared_bundle, monkeypatch, [(70, 102.0), (70, 102.0)]).metrics
    assert metrics.tpot_median_s == 0.0
    assert metrics.decode_tok_s is None


@pytest.mark.parametrize("tokens", [0, 1])
def test_real_short_answers_measure_only_what_there_was(bundle: Bundle, tokens: int) -> None:
    free = ask(baseline_engine(bundle)).token_ids
    assert free[0] != free[1]
    bundle.model.generation_config.eos_token_id = free[tokens]
    answer = ask(baseline_engine(bundle), Sampling(max_new_tokens=10))
    assert answer.metrics.finish_reason == "eos"
    assert answer.token_ids == free[:tokens]
    assert unmeasured(answer.metrics) - {"peak_rss_bytes"} == QUALITY | OF_PAGES | OF_GAPS | (set() if tokens else OF_TOKENS)


def test_measured_numbers_are_finite_and_positive(shared_bundle: Bundle) -> None:
    metrics = ask(baseline_engine(shared_bundle)).metrics
    numbers = {f.name: getattr(metrics, f.name) for f in fields(ChatMetrics) if isinstance(getattr(metrics, f.name), (int, float))}
    zero = {"weights_kept_for_undo_bytes", "weights_packed_bytes"}
    assert all(math.isfinite(v) and (v > 0 or n in zero) for n, v in numbers.items())


def test_peak_memory_is_not_measured_where_it_cannot_be_reset(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "reset_peak", lambda: False)
    assert ask(baseline_engine(shared_bundle)).metrics.peak_rss_bytes is None


def test_peak_memory_covers_what_the_answer_needed(bundle: Bundle) -> None:
    """64 MB held only during prefill must be in the peak, though they are gone at the end."""
    if not engine_module.reset_peak():
        pytest.skip("this system does not reset the peak of resident memory")
    engine = baseline_engine(bundle)
    ask(engine)
    gc.collect()  # what earlier tests left may go now, not after the mark
    small = ask(engine).metrics.peak_rss_bytes

    def take_fresh_pages(*_: Any) -> None:  # memory that was freed may still be resident; torch could get that
        mmap(-1, 2**26).write(bytes(2**26))

    handle = bundle.model.register_forward_pre_hook(take_fresh_pages)
    large = ask(engine).metrics.peak_rss_bytes
    handle.remove()
    again = ask(engine).metrics.peak_rss_bytes
    assert small is not None and large is not None and again is not None
    assert large - small > 0.9 * 2**26
    assert large - again > 0.9 * 2**26


def test_stop_keeps_the_partial_answer(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    full = ask(baseline_engine(bundle))
    stop, seen = Stop(), []

    def on_text(piece: str) -> None:
        seen.append(piece)
        if len(seen) == 4:
            stop.request()

    answer = baseline_engine(bundle).answer(QUESTION, FIXED, stop, on_text)
    assert answer.token_ids == full.token_ids[:4]
    assert answer.text == "".join(seen)
    assert answer.metrics.finish_reason == "stopped"
    assert answer.metrics.output_tokens == 4


def test_warm_up_leaves_no_first_time_work_to_the_first_answer(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling the chat template takes longer than a tiny prefill; left over, it would slow the first column only."""
    rendered: list[None] = []
    render = bundle.tokenizer.apply_chat_template
    monkeypatch.setattr(bundle.tokenizer, "apply_chat_template", lambda *args, **kwargs: rendered.append(None) or render(*args, **kwargs))
    baseline_engine(bundle).warm_up()
    assert rendered


def test_warm_up_takes_a_template_that_refuses_its_text(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle.tokenizer, "chat_template", "{{ raise_exception('no') }}")
    baseline_engine(bundle).warm_up()


def test_too_long_prompt_is_refused_before_the_model_runs(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "generate", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(PromptTooLong, match="256 in all"):
        ask(baseline_engine(shared_bundle), Sampling(max_new_tokens=250))


def test_error_in_the_model_leaves_the_engine_usable(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = baseline_engine(bundle)
    before = ask(engine).token_ids
    step, calls = generation.decode_one_token, []

    def failing(*args: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("broken at the third token")
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "decode_one_token", failing)
        with pytest.raises(RuntimeError, match="third token"):
            ask(engine)
    assert ask(engine).token_ids == before
