"""Chats over reserved caches: what an earlier prompt left is used again without changing an answer, and memory that is not there is said in numbers."""

from __future__ import annotations

import ctypes
import errno
import gc
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from core import decoding
from core.bundle import Bundle, ModelInfo
from core.decoding import decode_one_token, prefill
from core.errors import OutOfMemory
from core.progress import Stop
from engines.chat import ChatRequest, ChatService, collect
from engines.engine import Answer, Engine, fused_engine
from engines.generation import TokenDecoded, generate
from engines.methods import parse_method
from engines.pool import EnginePool
from engines.prompting import Message
from engines.sampling import Sampling
from kernels.kv_memory import region
from kernels.kv_memory.cache import TokenMajorCache
from kernels.kv_memory.region import PAGE_GROUP, reservations_work
from kernels.kv_memory.reservation_pool import KEPT_TEXTS, ReservationPool
from kernels.kv_memory.shared_prefix import sharing_works
from tests.tolerances import SUM_ORDER

pytestmark = pytest.mark.skipif(not reservations_work(), reason="NOT RUN: this system does not reserve memory without committing it")
needs_sharing = pytest.mark.skipif(not sharing_works(), reason="NOT RUN: this system has no files in memory that can be sealed")

CONTEXT, LAYERS = 1024, 2
SYSTEM = "You answer in short and simple words, and you say so when you do not know. " * 5
GROUP_TOKENS = PAGE_GROUP // (4 * 64 * 4)
"""Tokens of a page group in this model: 4 heads of 64 in float32."""


def wide_model(tokenizer: PreTrainedTokenizerBase, context: int = CONTEXT) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4, initializer_range=0.1,
        max_position_embeddings=context, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )).eval()


@pytest.fixture(scope="module")
def wide(tokenizer: PreTrainedTokenizerBase) -> Bundle:
    return Bundle(wide_model(tokenizer), tokenizer, ModelInfo("wide", None, "float32", "local"))


@pytest.fixture(params=["vattention", "native+vattention", "native+vattention+larosa:sparsity=0.4"])
def engine(request: pytest.FixtureRequest, wide: Bundle) -> Engine:
    return fused_engine(wide, parse_method(request.param))


@pytest.fixture
def plain(wide: Bundle) -> Engine:
    return fused_engine(wide, parse_method("vattention"))


def pool_of(engine: Engine) -> ReservationPool:
    pool = engine.bundle.cache_factory.__self__  # type: ignore[attr-defined]
    assert isinstance(pool, ReservationPool)
    return pool


def conversation(*texts: str) -> list[Message]:
    turns: list[Message] = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": SYSTEM}, *turns]


def ask(engine: Engine, messages: Sequence[Message], reuse: bool = True) -> Answer:
    return engine.answer(messages, Sampling(max_new_tokens=12, ignore_eos=True), Stop(), lambda _: None, reuse=reuse)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_turns_regenerate_and_undo_reuse_what_is_known_and_answer_the_same(engine: Engine) -> None:
    first = conversation("What is a page?")
    opening = ask(engine, first)
    assert opening.metrics.kv_reused_tokens == 0
    second = [*first, {"role": "assistant", "content": opening.text}, {"role": "user", "content": "And who commits it?"}]
    undone = conversation("What is a group of pages, and why are there any?")
    following = ask(engine, second)
    assert following.metrics.kv_reused_tokens == common(opening.prompt.ids, following.prompt.ids), "the answer was decoded, and is read anew"
    regenerated = ask(engine, second)
    assert regenerated.metrics.kv_reused_tokens == len(following.prompt.ids) - 1, "all but the token whose logits are needed"
    changed = ask(engine, undone)
    assert changed.metrics.kv_reused_tokens == common(following.prompt.ids, changed.prompt.ids) > 3 * GROUP_TOKENS
    for messages, answers in ((second, (following, regenerated)), (undone, (changed,))):
        fresh = ask(engine, messages, reuse=False)
        assert fresh.metrics.kv_reused_tokens == 0
        assert all(answer.token_ids == fresh.token_ids for answer in answers)


def test_only_what_is_not_reused_is_computed(plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = conversation("What is a page?")
    ask(plain, messages)
    read: list[int] = []
    real = plain.bundle.model.forward

    def forward(input_ids: torch.Tensor, **settings: Any) -> Any:
        read.append(input_ids.shape[1])
        return real(input_ids=input_ids, **settings)

    monkeypatch.setattr(plain.bundle.model, "forward", forward)
    monkeypatch.setattr(decoding, "_cache_name", lambda _: "past_key_values")
    again = ask(plain, messages)
    assert read[0] == 1 and len(read) == 12
    assert again.metrics.prefill_tok_s is not None and again.metrics.prefill_tok_s < 1 / again.metrics.ttft_s * 20  # type: ignore[operator]


@needs_sharing
def test_shared_pages_give_the_very_logits_that_copied_ones_and_own_ones_give(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same split of the prompt three times: computed here, taken over by copying, taken over by sharing."""
    bundle, pool = engine.bundle, pool_of(engine)
    ids = torch.randint(10, 200, (4 * GROUP_TOKENS + 30,), generator=torch.Generator().manual_seed(3)).tolist()
    other = [*ids[: 3 * GROUP_TOKENS + 20], *reversed(ids[3 * GROUP_TOKENS + 20 :])]
    split = common(ids, other)

    def logits(cache: TokenMajorCache, start: int) -> torch.Tensor:
        last = prefill(bundle, other[start:], cache, Stop())
        assert last is not None
        return torch.stack([last, *(decode_one_token(bundle, token, cache).clone() for token in ids[:10])])

    own = bundle.cache_factory()
    prefill(bundle, other[:split], own, Stop())
    expected = logits(own, split)

    def second() -> TokenMajorCache:
        cache = bundle.cache_factory()
        assert cache.begin(other, reuse=True) == split
        return cache

    first = bundle.cache_factory()
    first.begin(ids, reuse=True)
    prefill(bundle, ids[:split], first, Stop())  # split as above, so that the same products are computed
    prefill(bundle, ids[split:], first, Stop())
    first.has_read(ids)
    del first
    with monkeypatch.context() as patched:
        patched.setattr("kernels.kv_memory.reservation_pool.prefix_file", lambda _: None)
        copied = second()
        assert copied.stats().shared_bytes == 0
        assert torch.equal(logits(copied, split), expected)
        del copied
    shared = second()
    assert shared.stats().shared_bytes == LAYERS * 2 * 3 * PAGE_GROUP == pool.shared_bytes()
    assert torch.equal(logits(shared, split), expected)


@needs_sharing
def test_two_chats_with_one_system_prompt_hold_it_once_and_go_on_alone(plain: Engine) -> None:
    pool = pool_of(plain)
    one, two = conversation("What is a page?"), conversation("Who are you?")
    ask(plain, one)
    second = ask(plain, two)
    shared = second.metrics.kv_shared_bytes
    assert second.metrics.kv_reused_tokens is not None and shared is not None
    assert shared == pool.shared_bytes() == LAYERS * 2 * (second.metrics.kv_reused_tokens // GROUP_TOKENS) * PAGE_GROUP > 0
    regenerated = ask(plain, one)
    assert regenerated.metrics.kv_reused_tokens == len(regenerated.prompt.ids) - 1, "the second chat took the first one's text away"
    assert regenerated.token_ids == ask(plain, one, reuse=False).token_ids
    assert regenerated.metrics.kv_shared_bytes == shared


def test_texts_that_wait_are_few_and_the_oldest_go(plain: Engine) -> None:
    for number in range(KEPT_TEXTS + 3):
        ask(plain, [{"role": "user", "content": f"{number} is a number."}])
    gc.collect()
    pool = pool_of(plain)
    assert len(pool._waiting) <= KEPT_TEXTS
    newest = ask(plain, [{"role": "user", "content": f"{KEPT_TEXTS + 2} is a number."}])
    assert newest.metrics.kv_reused_tokens == len(newest.prompt.ids) - 1


def test_scoring_and_measurements_neither_use_nor_disturb_what_is_kept(plain: Engine) -> None:
    messages = conversation("What is a page?")
    kept = ask(plain, messages)
    assert ask(plain, messages, reuse=False).metrics.kv_reused_tokens == 0
    cache = plain.bundle.cache_factory()
    prefill(plain.bundle, kept.prompt.ids[::-1], cache, Stop())
    del cache
    again = ask(plain, messages)
    assert again.metrics.kv_reused_tokens == len(kept.prompt.ids) - 1 and again.token_ids == kept.token_ids


def test_a_text_written_over_is_not_taken_for_what_it_was(plain: Engine) -> None:
    bundle, ids = plain.bundle, list(range(20, 60))
    for spoil in ("crop", "reset", "evicted"):
        cache = bundle.cache_factory()
        cache.begin(ids, reuse=True)
        prefill(bundle, ids, cache, Stop())
        if spoil == "evicted":  # one layer keeps fewer tokens, as cascading eviction leaves it
            cache.layers[1].length -= 5
        cache.has_read(ids)
        if spoil == "crop":
            cache.crop(-30)
        elif spoil == "reset":
            cache.reset()
        if spoil != "evicted":
            prefill(bundle, ids[::-1], cache, Stop())
        del cache
        following = bundle.cache_factory()
        known = following.begin(ids, reuse=True)
        assert known == {"crop": 10, "reset": 0, "evicted": 0}[spoil], spoil
        logits = prefill(bundle, ids[known:], following, Stop())
        fresh = bundle.cache_factory()
        expected = prefill(bundle, ids, fresh, Stop())
        assert logits is not None and expected is not None and SUM_ORDER.holds(logits, expected)
        following.reset()
        del following, fresh
        gc.collect()


def test_an_answer_says_what_its_cache_took(plain: Engine, wide: Bundle) -> None:
    metrics = ask(plain, conversation("What is a page?")).metrics
    assert metrics.kv_waste_bytes == metrics.kv_committed_bytes + metrics.kv_shared_bytes - metrics.kv_in_use_bytes  # type: ignore[operator]
    assert metrics.kv_pages_waited and metrics.kv_faults_avoided is not None and metrics.kv_pages_ahead is not None
    again = ask(plain, conversation("What is a page?")).metrics
    assert again.kv_pages_waited == 0, "the text's own pages were there"
    assert again.kv_faults_avoided == LAYERS * 2 * -(-again.kv_in_use_bytes // (LAYERS * 2 * 4096))  # type: ignore[operator]
    other = ask(Engine(wide), conversation("What is a page?")).metrics
    assert other.kv_reused_tokens is other.kv_faults_avoided is other.kv_waste_bytes is None


def test_the_report_says_where_nothing_is_shared(wide: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("in memory once" in note for note in fused_engine(wide, parse_method("vattention")).reports[0].notes) == sharing_works()
    monkeypatch.setattr("kernels.kv_memory.shared_prefix.os.memfd_create", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "none")))
    assert any("is copied: this system has no sealed files" in note for note in fused_engine(wide, parse_method("vattention")).reports[0].notes)


class NoMemory:
    """The C library on a machine whose memory is full while `on`."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.on = inner, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def madvise(self, start: int, size: int, advice: int) -> int:
        if self.on and advice == region._POPULATE_WRITE:
            ctypes.set_errno(errno.ENOMEM)
            return -1
        return int(self._inner.madvise(start, size, advice))


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> NoMemory:
    library = NoMemory(region._LIBC)
    monkeypatch.setattr(region, "_LIBC", library)
    return library


@pytest.mark.parametrize("method", ["vattention", "native+vattention"])
def test_memory_that_ends_while_decoding_fails_that_answer_with_the_numbers_and_the_next_one_works(wide: Bundle, full: NoMemory, method: str) -> None:
    engine = fused_engine(wide, parse_method(method))
    ids = list(range(20, 20 + GROUP_TOKENS - 2))
    expected = [e.token for e in generate(engine.bundle, ids, Sampling(max_new_tokens=30, ignore_eos=True), Stop()) if isinstance(e, TokenDecoded)]
    for memory in pool_of(engine)._waiting:
        for storage in memory.storages:
            storage.release_from(0)
    got = []
    with pytest.raises(OutOfMemory, match=r"needs [\d.]+ KiB more, has [\d.]+ KiB in this layer, and the system has no memory left \(.*[\d.]+ GiB of memory available"):
        for event in generate(engine.bundle, ids, Sampling(max_new_tokens=400, ignore_eos=True), Stop()):
            if isinstance(event, TokenDecoded):
                got.append(event.token)
                full.on = True
    full.on = False
    assert 1 <= len(got) < 399 and got[:30] == expected[: len(got)]
    after = [e.token for e in generate(engine.bundle, ids, Sampling(max_new_tokens=30, ignore_eos=True), Stop()) if isinstance(e, TokenDecoded)]
    assert after == expected


@pytest.fixture
def saved(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, request: pytest.FixtureRequest) -> str:
    wide_model(tokenizer, getattr(request, "param", CONTEXT)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def run(service: ChatService, folder: str, *methods: str, **settings: Any) -> tuple[dict[str, Answer], dict[str, str]]:
    return collect(service.stream(ChatRequest("What is a page?", methods, folder, dtype="float32", sampling=Sampling(8, ignore_eos=True), score=False, **settings)))


@pytest.mark.parametrize("saved", [2**44], indirect=True)
def test_more_address_space_than_there_is_fails_its_column_with_the_numbers_and_the_running_model_answers(saved: str) -> None:
    service = ChatService(EnginePool())
    before, _ = run(service, saved, "baseline")
    answers, errors = run(service, saved, "baseline", "vattention", reverse=True)
    assert f"{2**44:,} tokens takes" in errors["vattention"] and "address space" in errors["vattention"]
    assert answers["baseline"].token_ids == before["baseline"].token_ids


def test_memory_that_ends_while_a_prompt_is_read_fails_its_column_and_the_running_model_answers(saved: str, full: NoMemory) -> None:
    service = ChatService(EnginePool())
    before, errors = run(service, saved, "baseline", "vattention")
    assert not errors
    full.on = True
    answers, errors = run(service, saved, "baseline", "vattention", system=SYSTEM, reverse=True)
    assert "no memory left" in errors["vattention"] and "baseline" in answers
    full.on = False
    after, errors = run(service, saved, "baseline", "vattention")
    assert not errors and {m: a.token_ids for m, a in after.items()} == {m: a.token_ids for m, a in before.items()}


def test_a_prompt_larger_than_the_memory_left_is_refused_before_it_is_read(plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(plain, conversation("What is a page?"))
    monkeypatch.setattr("kernels.kv_memory.reservation_pool.available_bytes", lambda: 1000)
    ids = list(range(10, 200)) * 4
    with pytest.raises(OutOfMemory, match=r"760 prompt tokens takes 3.0 MiB, [\d.]+ [MK]iB more than is committed, and 1000 B of memory are available"):
        list(generate(plain.bundle, ids, Sampling(max_new_tokens=2), Stop(), reuse=True))


def test_a_limit_on_address_space_is_named() -> None:
    code = """
import resource
from core.errors import OutOfMemory
from kernels.kv_memory.layout import KVLayout
from kernels.kv_memory.reservation_pool import ReservationPool
import torch
layouts = (KVLayout(8, 8, 64, torch.float32),) * 8
small = ReservationPool(layouts, 100).cache()
limit = 64 * 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    ReservationPool(layouts, 4_000_000).cache()
except OutOfMemory as error:
    print(error)
small.update(torch.ones(1, 8, 3, 64), torch.ones(1, 8, 3, 64), 0)
print("still", small.length)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(region.__file__).parent.parent.parent)
    assert "4,000,000 tokens takes 122 GiB" in ran.stdout and "64.0 GiB of address space allowed" in ran.stdout and "still 3" in ran.stdout, ran.stdout + ran.stderr
