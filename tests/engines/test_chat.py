"""Several engines side by side: order of events, failures that stay in their column, stopping, the gate, quality."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import pytest
import torch

import engines.chat as chat_module
import engines.pool as pool_module
import engines.quality as quality_module
from core.bundle import Bundle
from core.errors import CalibrationError, FuseboxError, HubUnavailable, InvalidRequest
from core.progress import Stop
from engines import generation
from engines.chat import (
    MAX_COLUMNS,
    ChatEvent,
    ChatRequest,
    ChatService,
    ColumnDone,
    ColumnFailed,
    ColumnStatus,
    ColumnText,
    Tick,
    collect,
)
from engines.engine import Answer
from engines.gate import DeviceGate
from engines.methods import parse_method
from engines.pool import EnginePool

Make = Callable[..., ChatRequest]
THREE = ("baseline", "word_removal", "bnb_int8")


@pytest.fixture(scope="module")
def module_pool() -> EnginePool:
    return EnginePool()


@pytest.fixture
def service(module_pool: EnginePool) -> ChatService:
    """A service of its own gate over engines that all tests of this file share; engines never change."""
    return ChatService(module_pool)


def events_of(service: ChatService, request: ChatRequest, stop: Stop | None = None) -> list[ChatEvent]:
    return [e for e in service.stream(request, stop) if not isinstance(e, Tick)]


def ask(service: ChatService, request: ChatRequest) -> tuple[dict[str, Answer], dict[str, str]]:
    return collect(service.stream(request))


def columns_of(events: Sequence[ChatEvent], *kinds: type) -> list[str]:
    return [e.column for e in events if isinstance(e, kinds)]  # type: ignore[union-attr]


def runs(names: Sequence[str]) -> list[str]:
    """`aabba` -> `aba`."""
    return [name for name, _ in groupby(names)]


def engine_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("engine")]


def on_decode(monkeypatch: pytest.MonkeyPatch, before: Callable[[Bundle], None]) -> None:
    """Call `before` ahead of every decode step, in the thread that makes it."""
    step = generation.decode_one_token

    def decode(bundle: Bundle, token: int, cache: Any) -> torch.Tensor:
        before(bundle)
        return step(bundle, token, cache)

    monkeypatch.setattr(generation, "decode_one_token", decode)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("reverse", [False, True])
def test_columns_answer_one_after_the_other(service: ChatService, make_request: Make, reverse: bool) -> None:
    order = list(reversed(THREE)) if reverse else list(THREE)
    events = events_of(service, make_request(*THREE, reverse=reverse, score=False))
    assert runs(columns_of(events, ColumnText)) == order
    assert columns_of(events, ColumnDone) == order
    for column in order:  # a column is done before the next one says a word
        mine = [i for i, e in enumerate(events) if isinstance(e, ColumnText) and e.column == column]
        done = next(i for i, e in enumerate(events) if isinstance(e, ColumnDone) and e.column == column)
        assert max(mine) < done
        assert done < min((i for i, e in enumerate(events) if isinstance(e, ColumnText) and order.index(e.column) > order.index(column)), default=done + 1)


def test_every_column_says_that_it_waits_before_any_answers(service: ChatService, make_request: Make) -> None:
    events = events_of(service, make_request(*THREE, score=False))
    assert events[:3] == [ColumnStatus(column, "waiting") for column in THREE]


def test_streamed_text_is_the_answer(service: ChatService, make_request: Make) -> None:
    events = events_of(service, make_request(*THREE, score=False))
    for done in (e for e in events if isinstance(e, ColumnDone)):
        streamed = "".join(e.text for e in events if isinstance(e, ColumnText) and e.column == done.column)
        assert streamed == done.answer.text
        assert done.answer.metrics.output_tokens == 12


def test_at_once_runs_columns_together_and_marks_the_times(service: ChatService, make_request: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both columns must be in their prefill at the same time, or the barrier breaks."""
    request = make_request("baseline", "word_removal", score=False)
    ask(service, request)  # engines are built
    both, prefill = threading.Barrier(2), generation.prefill

    def meeting(*args: Any) -> Any:
        both.wait(60)
        return prefill(*args)

    monkeypatch.setattr(generation, "prefill", meeting)
    answers, errors = ask(service, make_request("baseline", "word_removal", score=False, at_once=True))
    assert errors == {}
    assert [a.metrics.times_comparable for a in answers.values()] == [False, False]
    assert [a.metrics.peak_rss_bytes for a in answers.values()] == [None, None]  # one process, one peak: not this column's


def test_at_once_never_runs_one_engine_in_two_threads(service: ChatService, make_request: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine is not made for that: quantised layers keep state between the calls of one forward."""
    inside: dict[int, int] = {}
    most, prefill = [0], generation.prefill

    def slow(bundle: Bundle, *args: Any) -> Any:
        inside[id(bundle)] = inside.get(id(bundle), 0) + 1
        most[0] = max(most[0], inside[id(bundle)])
        time.sleep(0.1)
        inside[id(bundle)] -= 1
        return prefill(bundle, *args)

    ask(service, make_request("bnb_int8", score=False))  # built
    monkeypatch.setattr(generation, "prefill", slow)
    answers, errors = ask(service, make_request("bnb_int8", "bnb_int8:threshold=6", score=False, at_once=True))
    assert errors == {}
    assert most == [1]
    assert len({a.token_ids for a in answers.values()}) == 1


def test_at_once_with_one_column_keeps_its_times_comparable(service: ChatService, make_request: Make) -> None:
    answers, _ = ask(service, make_request("baseline", at_once=True))
    assert answers["baseline"].metrics.times_comparable is True


def test_at_once_gives_the_same_answers_as_in_turn(service: ChatService, make_request: Make) -> None:
    in_turn, _ = ask(service, make_request(*THREE, score=False))
    together, _ = ask(service, make_request(*THREE, score=False, at_once=True))
    assert {c: a.token_ids for c, a in together.items()} == {c: a.token_ids for c, a in in_turn.items()}


def test_one_method_named_twice_is_one_column(service: ChatService, make_request: Make) -> None:
    events = events_of(service, make_request("baseline", " baseline ", score=False))
    assert columns_of(events, ColumnDone) == ["baseline"]


# ---------------------------------------------------------------- requests that cannot be served


@pytest.mark.parametrize("message", ["", " \n", "\u200b", "\0", None, 3, ["hi"]])
def test_blank_message_is_refused_before_anything_runs(service: ChatService, make_request: Make, message: Any) -> None:
    with pytest.raises(InvalidRequest, match="message"):
        service.stream(make_request("baseline", message=message))
    assert engine_threads() == []


@pytest.mark.parametrize("methods", [(), "baseline", (["baseline"],), (None,), ({"a": 1},), (3,), None, 3])
def test_methods_that_are_no_list_of_names_are_refused(service: ChatService, make_request: Make, methods: Any) -> None:
    request = make_request("baseline")
    with pytest.raises(InvalidRequest, match=r"(?i)method"):
        service.stream(ChatRequest(request.message, methods, request.model_id))
    assert engine_threads() == []


def test_too_many_columns_are_refused_with_the_numbers(service: ChatService, make_request: Make) -> None:
    methods = [f"word_removal:minimum_words={n}" for n in range(MAX_COLUMNS + 1)]
    with pytest.raises(InvalidRequest, match=f"{MAX_COLUMNS + 1} methods.*at most {MAX_COLUMNS}"):
        service.stream(make_request(*methods))


@pytest.mark.parametrize("system", [3, ["x"], {"a": 1}, "a" * 1_000_001], ids=["number", "list", "object", "huge"])
def test_unusable_system_prompt_is_refused_in_words(service: ChatService, make_request: Make, system: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"is (int|list|dict), not text|1,000,001 characters"):
        service.stream(make_request("baseline", system=system))


def test_lone_surrogate_in_the_system_prompt_does_not_break_the_column(service: ChatService, make_request: Make) -> None:
    answers, errors = ask(service, make_request("baseline", system="Be \ud800 brief.\0"))
    assert errors == {}
    answers["baseline"].prompt.text.encode("utf-8")


def test_unknown_dtype_is_refused(service: ChatService, make_request: Make) -> None:
    with pytest.raises(InvalidRequest, match="int3"):
        service.stream(make_request("baseline", dtype="int3"))


def test_unknown_model_fails_every_column_in_words(service: ChatService, make_request: Make) -> None:
    request = make_request("baseline", "word_removal")
    answers, errors = ask(service, ChatRequest(request.message, request.methods, "./no-such-model"))
    assert answers == {}
    assert set(errors) == {"baseline", "word_removal"}
    assert all("no such folder" in text for text in errors.values())


def test_loaded_model_is_not_looked_for_again(service: ChatService, make_request: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub may be slow or down by now; the engine is here."""
    assert ask(service, make_request("baseline"))[1] == {}

    def unreachable(*_: Any, **__: Any) -> None:
        raise HubUnavailable("The hub cannot be reached.")

    monkeypatch.setattr(chat_module, "locate", unreachable)
    answers, errors = ask(service, make_request("baseline", "word_removal:every=5"))
    assert errors == {}
    assert set(answers) == {"baseline", "word_removal:every=5"}


def test_too_long_prompt_fails_its_column_with_the_numbers(service: ChatService, make_request: Make) -> None:
    answers, errors = ask(service, make_request("baseline", message="machine " * 300))
    assert answers == {}
    assert "256 in all" in errors["baseline"]


# ---------------------------------------------------------------- a failing column


@pytest.mark.parametrize("bad", ["word_removl", "word_removal:every=2", "bnb_int8+bnb_nf4", "b\u0430seline", "x" * 400])
def test_bad_method_fails_alone(service: ChatService, make_request: Make, bad: str) -> None:
    answers, errors = ask(service, make_request("baseline", bad, "word_removal"))
    assert set(answers) == {"baseline", "word_removal"}
    assert set(errors) == {bad}
    assert answers["word_removal"].metrics.agreement_share is not None


def test_engine_that_breaks_at_a_token_fails_alone_and_the_next_request_works(service: ChatService, make_request: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(*THREE)
    healthy, _ = ask(service, request)
    calls: list[None] = []

    def break_word_removal(bundle: Bundle) -> None:
        if bundle.prompt_filters:
            calls.append(None)
            if len(calls) == 4:
                raise RuntimeError("broken at token 4")

    with monkeypatch.context() as patch:
        on_decode(patch, break_word_removal)
        events = events_of(service, request)
    answers, errors = collect(iter(events))
    assert {c: a.token_ids for c, a in answers.items()} == {c: healthy[c].token_ids for c in ("baseline", "bnb_int8")}
    assert set(errors) == {"word_removal"}
    assert "RuntimeError: broken at token 4" in errors["word_removal"]
    said = "".join(e.text for e in events if isinstance(e, ColumnText) and e.column == "word_removal")
    assert said != ""  # what was said before stays
    assert healthy["word_removal"].text.startswith(said)
    again, errors = ask(service, request)
    assert errors == {}
    assert {c: a.token_ids for c, a in again.items()} == {c: a.token_ids for c, a in healthy.items()}


def test_memory_that_runs_out_fails_its_column_in_words(service: ChatService, make_request: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(bundle: Bundle) -> None:
        if not bundle.prompt_filters:
            raise MemoryError

    with monkeypatch.context() as patch:
        on_decode(patch, exhaust)
        answers, errors = ask(service, make_request("baseline", "word_removal"))
    assert set(answers) == {"word_removal"}
    assert "Memory ran out" in errors["baseline"]
    assert ask(service, make_request("baseline"))[1] == {}


def test_long_error_text_is_cut(service: ChatService, make_request: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Bundle) -> None:
        raise ValueError("x" * 10_000)

    on_decode(monkeypatch, fail)
    assert len(ask(service, make_request("baseline"))[1]["baseline"]) < 400


@pytest.mark.parametrize("error", [RuntimeError("scoring broke"), CalibrationError("scoring broke"), MemoryError()], ids=lambda e: type(e).__name__)
def test_failed_scoring_keeps_the_answers_and_leaves_the_score_unmeasured(service: ChatService, make_request: Make, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    crashed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", crashed.append)
    with monkeypatch.context() as patch:
        patch.setattr(quality_module, "score_continuation", fail)
        events = events_of(service, make_request("baseline", "word_removal"))
    assert crashed == []
    answers, errors = collect(iter(events))
    assert set(answers) == {"baseline", "word_removal"}
    assert errors == {}  # the answers did not fail
    assert all(a.metrics.baseline_answer_bits_per_byte is None for a in answers.values())
    assert ask(service, make_request("baseline"))[0]["baseline"].metrics.baseline_answer_bits_per_byte is not None


# ---------------------------------------------------------------- stopping


def test_stop_in_an_answer_keeps_the_partial_text_and_ends_within_one_token(service: ChatService, make_request: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    full, _ = ask(service, make_request("baseline", score=False))
    stop, calls = Stop(), []

    def press(_: Bundle) -> None:
        calls.append(None)
        if len(calls) == 5:
            stop.request()

    on_decode(monkeypatch, press)
    events = events_of(service, make_request("baseline", "word_removal"), stop)
    answers, errors = collect(iter(events))
    answer = answers["baseline"]
    assert answer.metrics.finish_reason == "stopped"
    assert answer.token_ids == full["baseline"].token_ids[:6]  # five were there, the sixth was being decoded
    assert len(calls) == 5
    assert answer.text == "".join(e.text for e in events if isinstance(e, ColumnText)) != ""
    assert answer.metrics.ttft_s is not None
    assert errors == {"word_removal": "Stopped before this column began."}
    assert not any(isinstance(e, ColumnStatus) and e.text == "scoring" for e in events)
    assert answer.metrics.baseline_answer_bits_per_byte is None


def test_stop_while_waiting_ends_the_request(module_pool: EnginePool, make_request: Make) -> None:
    service, stop = ChatService(module_pool), Stop()
    with service.gate.hold(Stop()):
        stream = service.stream(make_request("baseline", "word_removal"), stop)
        assert next(stream) == ColumnStatus("baseline", "waiting")
        wait_until(lambda: service.gate.waiting == 1)
        stop.request()
        answers, errors = collect(stream)
    assert answers == {}
    assert set(errors) == {"baseline", "word_removal"}
    assert all("while waiting" in text for text in errors.values())


def test_stop_while_the_model_loads_ends_the_request(make_request: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    service, stop, load = ChatService(EnginePool()), Stop(), pool_module.load_bundle

    def pressing(*args: Any, **settings: Any) -> Any:
        stop.request()
        return load(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "load_bundle", pressing)
        answers, errors = collect(service.stream(make_request("baseline", "word_removal"), stop))
    assert answers == {}
    assert errors == {"baseline": "Stopped while the model was loading.", "word_removal": "Stopped before this column began."}
    assert service.pool.keys() == []
    assert ask(service, make_request("baseline"))[1] == {}


def test_stop_while_scoring_leaves_answers_without_a_score(service: ChatService, make_request: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, score = Stop(), quality_module.score_continuation

    def pressing(*args: Any) -> Any:
        stop.request()
        return score(*args)

    monkeypatch.setattr(quality_module, "score_continuation", pressing)
    answers, errors = collect(service.stream(make_request("baseline", "word_removal"), stop))
    assert errors == {}
    assert [a.metrics.baseline_answer_bits_per_byte for a in answers.values()] == [None, None]
    assert [a.metrics.finish_reason for a in answers.values()] == ["length", "length"]


def test_closing_the_iterator_stops_the_engine_thread(service: ChatService, make_request: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []

    def slow(_: Bundle) -> None:
        calls.append(None)
        time.sleep(0.02)

    on_decode(monkeypatch, slow)
    stream = service.stream(make_request("baseline", max_new_tokens=100))
    while not isinstance(next(stream), ColumnText):
        pass
    before = len(calls)
    stream.close()  # type: ignore[attr-defined]
    assert engine_threads() == []
    assert len(calls) <= before + 2
    time.sleep(0.05)
    assert len(calls) <= before + 2
    with service.gate.hold(Stop()) as held:
        assert held


def test_iterator_that_is_never_read_starts_nothing(service: ChatService, make_request: Make) -> None:
    stream = service.stream(make_request("baseline"))
    assert engine_threads() == []
    stream.close()  # type: ignore[attr-defined]
    assert engine_threads() == []


def test_closing_again_or_after_the_end_does_nothing(service: ChatService, make_request: Make) -> None:
    stream = service.stream(make_request("baseline", score=False))
    collect(stream)
    stream.close()  # type: ignore[attr-defined]
    stream.close()  # type: ignore[attr-defined]
    assert list(stream) == []


def test_reader_hears_a_tick_while_nothing_happens(module_pool: EnginePool, make_request: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a reader that is woken can notice that its visitor has left."""
    monkeypatch.setattr(chat_module, "_TICK_S", 0.01)
    service = ChatService(module_pool)
    with service.gate.hold(Stop()):
        stream = service.stream(make_request("baseline"))
        assert [type(next(stream)) for _ in range(4)] == [ColumnStatus, Tick, Tick, Tick]
        stream.close()  # type: ignore[attr-defined]
    assert engine_threads() == []


# ---------------------------------------------------------------- several requests at once


def test_two_requests_get_their_own_answers_and_never_run_together(service: ChatService, make_request: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = {
        "first": make_request("baseline", "word_removal", message="How does machine learning work with many examples of the past?", score=False),
        "second": make_request("bnb_int8", "word_removal:every=4", message="What is artificial intelligence and what can machines learn from it?", score=False),
    }
    alone = {name: ask(service, request)[0] for name, request in requests.items()}
    threads_seen: list[int] = []

    def slow(_: Bundle) -> None:
        threads_seen.append(threading.get_ident())
        time.sleep(0.003)

    on_decode(monkeypatch, slow)
    results: dict[str, Any] = {}
    workers = [threading.Thread(target=lambda n=name, r=request: results.update({n: ask(service, r)})) for name, request in requests.items()]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for name in requests:
        answers, errors = results[name]
        assert errors == {}
        assert {c: a.token_ids for c, a in answers.items()} == {c: a.token_ids for c, a in alone[name].items()}
        assert all(a.metrics.times_comparable for a in answers.values())
    assert len(threads_seen) == 4 * 11
    assert len([k for k, _ in groupby(threads_seen)]) == 2  # one request's thread, then the other's


def test_request_beyond_the_waiting_limit_is_refused_in_words(module_pool: EnginePool, make_request: Make) -> None:
    service = ChatService(module_pool, DeviceGate(waiting_limit=1))
    with service.gate.hold(Stop()):
        waiting = service.stream(make_request("baseline"))
        next(waiting)
        wait_until(lambda: service.gate.waiting == 1)
        answers, errors = ask(service, make_request("baseline", "word_removal"))
        assert answers == {}
        assert errors == dict.fromkeys(("baseline", "word_removal"), "1 requests wait already. Try again in a minute.")
        waiting.close()  # type: ignore[attr-defined]
    assert ask(service, make_request("baseline"))[1] == {}


def test_many_impatient_requests_leave_the_engine_ready(service: ChatService, make_request: Make) -> None:
    """vLLM's test in small: many long requests that are dropped at once, then one that must be answered soon."""
    for _ in range(30):
        stream = service.stream(make_request("baseline", max_new_tokens=150))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    began = time.perf_counter()
    assert ask(service, make_request("baseline", max_new_tokens=3))[1] == {}
    assert time.perf_counter() - began < 30
    assert engine_threads() == []


# ---------------------------------------------------------------- quality


def logits_of(bundle: Bundle, ids: Sequence[int]) -> torch.Tensor:
    """[tokens, vocab_size] of one full forward pass, without a cache."""
    with torch.inference_mode():
        return bundle.model(input_ids=torch.tensor([list(ids)])).logits[0]


def reference_bits(bundle: Bundle, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Bits per byte by the definition."""
    rows = logits_of(bundle, [*prompt, *answer]).double()[len(prompt) - 1 : -1].log_softmax(-1)
    nats = -sum(float(rows[i, token]) for i, token in enumerate(answer))
    return nats / 0.6931471805599453 / len(bundle.tokenizer.decode(answer, skip_special_tokens=True).encode())


def test_baseline_answer_is_scored_under_every_engine(service: ChatService, make_request: Make) -> None:
    request = make_request(*THREE)
    events = events_of(service, request)
    answers, _ = collect(iter(events))
    baseline = answers["baseline"]
    for column, tolerance in (("baseline", 1e-4), ("word_removal", 1e-4)):
        bundle = service.pool.get(request.model_id, parse_method(column), dtype="float32").bundle
        expected = reference_bits(bundle, answers[column].prompt.ids, baseline.token_ids)
        assert answers[column].metrics.baseline_answer_bits_per_byte == pytest.approx(expected, rel=tolerance)
    bits = [answers[c].metrics.baseline_answer_bits_per_byte for c in THREE]
    assert len(set(bits)) == 3  # three engines, three figures
    assert columns_of(events, ColumnDone) == [*THREE, *THREE]  # the answer first, the figures when they are there


def test_baseline_agrees_with_itself_fully_and_the_others_as_far_as_they_do(service: ChatService, make_request: Make) -> None:
    answers, _ = ask(service, make_request(*THREE))
    reference = answers["baseline"].token_ids
    for answer in answers.values():
        shared = next((i for i, (a, b) in enumerate(zip(reference, answer.token_ids, strict=True)) if a != b), len(reference))
        assert (answer.metrics.agreement_tokens, answer.metrics.agreement_share) == (shared, shared / 12)
    assert answers["baseline"].metrics.agreement_share == 1.0
    assert min(a.metrics.agreement_share for a in answers.values()) < 1.0  # type: ignore[type-var]


@pytest.mark.parametrize("settings", [{"methods": ("word_removal",)}, {"methods": ("baseline", "word_removal"), "score": False}], ids=["no baseline", "scoring off"])
def test_quality_is_not_measured_without_a_baseline_or_when_switched_off(service: ChatService, make_request: Make, settings: dict[str, Any]) -> None:
    methods = settings.pop("methods")
    answers, errors = ask(service, make_request(*methods, **settings))
    assert errors == {}
    for answer in answers.values():
        metrics = answer.metrics
        assert (metrics.baseline_answer_bits_per_byte, metrics.agreement_tokens, metrics.agreement_share) == (None, None, None)


def test_baseline_is_bit_identical_before_and_after_fused_engines_ran(make_request: Make) -> None:
    service = ChatService(EnginePool())
    request = make_request("baseline")
    before, _ = ask(service, request)
    engine = service.pool.get(request.model_id, dtype="float32")
    prompt, answer = before["baseline"].prompt.ids, before["baseline"].token_ids
    logits = logits_of(engine.bundle, [*prompt, *answer])
    _, errors = ask(service, make_request("bnb_int8", "bnb_nf4+word_removal", "word_removal:every=4"))
    assert errors == {}
    after, _ = ask(service, request)
    assert service.pool.get(request.model_id, dtype="float32") is engine
    assert after["baseline"].token_ids == answer
    assert torch.equal(logits_of(engine.bundle, [*prompt, *answer]), logits)


# ---------------------------------------------------------------- conversations


def test_each_column_goes_on_with_its_own_history(service: ChatService, make_request: Make) -> None:
    histories = {"baseline": [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "One."}]}
    answers, _ = ask(service, make_request("baseline", "word_removal", message="Second?", system="Be brief.", histories=histories))
    assert answers["baseline"].prompt.text == (
        "<|bos|><|system|>Be brief.<|end|><|user|>First?<|end|><|assistant|>One.<|end|><|user|>Second?<|end|><|assistant|>"
    )
    assert answers["word_removal"].prompt.text == "<|bos|><|system|>Be brief.<|end|><|user|>Second?<|end|><|assistant|>"


def test_blank_system_prompt_is_left_out(service: ChatService, make_request: Make) -> None:
    answers, _ = ask(service, make_request("baseline", message="Hi?", system=" \n"))
    assert answers["baseline"].prompt.text == "<|bos|><|user|>Hi?<|end|><|assistant|>"


def test_system_prompt_without_a_visible_character_is_left_out(service: ChatService, make_request: Make) -> None:
    answers, _ = ask(service, make_request("baseline", message="Hi?", system="\u200b\ufeff"))
    assert answers["baseline"].prompt.text == "<|bos|><|user|>Hi?<|end|><|assistant|>"


def test_collect_keeps_the_last_word_on_each_column() -> None:
    def events() -> Iterator[ChatEvent]:
        yield ColumnStatus("a", "waiting")
        yield Tick()
        yield ColumnDone("a", "draft")  # type: ignore[arg-type]
        yield ColumnFailed("b", "no")
        yield ColumnDone("a", "final")  # type: ignore[arg-type]

    assert collect(events()) == ({"a": "final"}, {"b": "no"})


def test_every_error_of_the_tree_reaches_its_column_as_it_is(service: ChatService, make_request: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise FuseboxError("in plain words")

    monkeypatch.setattr(service.pool.__class__, "get", fail)
    assert ask(service, make_request("baseline"))[1] == {"baseline": "in plain words"}
