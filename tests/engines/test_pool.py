"""The pool: one engine per key, a byte budget, and a baseline in the faster dtype."""

from __future__ import annotations

import shutil
import threading
import time
import weakref
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import engines.dtype_choice as dtype_choice_module
import engines.pool as pool_module
from compression.quant.technique import BnbInt8
from core.bundle import Bundle
from core.errors import FuseboxError, InvalidRequest, ModelNotFound, OutOfMemory, UnsupportedModel
from core.loading import load_bundle
from core.progress import Stop
from engines.dtype_choice import faster_dtype
from engines.engine import Engine
from engines.methods import parse_method
from engines.pool import EnginePool, check_dtype
from engines.sampling import Sampling
from optim.word_removal.technique import WordRemoval

FP32 = {"dtype": "float32"}


@pytest.fixture
def folders(model_folder: Path, tmp_path: Path) -> list[str]:
    """Four copies of the tiny model, as four models."""
    return [str(shutil.copytree(model_folder, tmp_path / name)) for name in "abcd"]


@pytest.fixture
def model(model_folder: Path) -> str:
    return str(model_folder)


def size_of(model: str) -> int:
    pool = EnginePool()
    pool.get(model, **FP32)
    return pool.held_bytes()


def loaded(pool: EnginePool) -> list[str]:
    return [Path(key.model_id).name for key in pool.keys()]


def count_loads(monkeypatch: pytest.MonkeyPatch, delay_s: float = 0.0) -> list[str]:
    calls: list[str] = []

    def load(model_id: str, **settings: Any) -> Bundle:
        calls.append(model_id)
        time.sleep(delay_s)
        return load_bundle(model_id, **settings)

    monkeypatch.setattr(pool_module, "load_bundle", load)
    return calls


def test_same_key_gives_the_same_engine(pool: EnginePool, model: str) -> None:
    chain = (BnbInt8(share=0.5), WordRemoval())
    assert pool.get(model, **FP32) is pool.get(model, **FP32)
    assert pool.get(model, chain, **FP32) is pool.get(model, tuple(reversed(chain)), **FP32)
    assert pool.get(model, (WordRemoval(every=3),), **FP32) is pool.get(model, (WordRemoval(),), **FP32)


def test_one_setting_typed_in_two_ways_is_one_engine(pool: EnginePool, model: str) -> None:
    assert pool.get(model, parse_method("word_removal:every=4"), **FP32) is pool.get(model, parse_method("word_removal:every=4.0"), **FP32)


def test_different_settings_give_different_engines(pool: EnginePool, model: str) -> None:
    engines = [
        pool.get(model, **FP32), pool.get(model, dtype="bfloat16"), pool.get(model, (WordRemoval(),), **FP32), pool.get(model, (WordRemoval(every=4),), **FP32),
        pool.get(model, (BnbInt8(),), **FP32), pool.get(model, (BnbInt8(), WordRemoval()), **FP32),
    ]
    assert len({id(e) for e in engines}) == len(engines) == len(pool.keys())
    assert engines[1].bundle.model.dtype == torch.bfloat16


def test_engines_of_one_model_are_built_over_one_load(pool: EnginePool, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_loads(monkeypatch)
    pool.get(model, (WordRemoval(),), **FP32)
    pool.get(model, (BnbInt8(),), **FP32)
    pool.get(model, **FP32)
    assert calls == [model]


def test_shared_tensors_count_once(pool: EnginePool, model: str) -> None:
    base = pool.get(model, **FP32)
    alone = pool.held_bytes()
    assert alone == base.weights.in_use
    pool.get(model, (WordRemoval(),), **FP32)
    assert pool.held_bytes() == alone
    int8 = pool.get(model, (BnbInt8(),), **FP32)
    assert pool.held_bytes() == pytest.approx(alone + int8.weights.packed, rel=0.001)  # outlier indices of the warm-up come on top


def test_budget_drops_the_least_recently_used(folders: list[str]) -> None:
    a, b, c, _ = folders
    pool = EnginePool(budget_bytes=int(2.5 * size_of(a)))
    for model in (a, b, a, c):
        pool.get(model, **FP32)
    assert loaded(pool) == ["a", "c"]
    assert pool.held_bytes() <= pool.budget_bytes
    pool.get(b, **FP32)
    assert loaded(pool) == ["c", "b"]


def test_budget_keeps_the_engine_that_was_asked_for_even_if_it_is_too_large(folders: list[str]) -> None:
    pool = EnginePool(budget_bytes=1)
    for model in folders[:2]:
        engine = pool.get(model, **FP32)
        assert [pool.get(model, **FP32) is engine, loaded(pool)] == [True, [Path(model).name]]


def test_budget_counts_what_engines_share_once(folders: list[str]) -> None:
    """Three engines over one model fit where two models do not."""
    a, b, *_ = folders
    pool = EnginePool(budget_bytes=int(1.5 * size_of(a)))
    pool.get(a, **FP32)
    pool.get(a, (WordRemoval(),), **FP32)
    pool.get(a, (WordRemoval(every=4),), **FP32)
    assert len(pool.keys()) == 3
    pool.get(b, **FP32)
    assert loaded(pool) == ["b"]


def test_dropped_engine_still_answers_whoever_holds_it(folders: list[str]) -> None:
    pool = EnginePool(budget_bytes=1)
    engine = pool.get(folders[0], **FP32)
    pool.get(folders[1], **FP32)
    assert engine.answer([{"role": "user", "content": "hello"}], Sampling(max_new_tokens=3, ignore_eos=True), Stop(), lambda _: None).metrics.output_tokens == 3


class Broken(BnbInt8):
    """Fails in the middle of its work."""

    def quantise(self, layer: torch.nn.Module) -> torch.nn.Module:
        raise RuntimeError("broken")


class Refusing(BnbInt8):
    """Admits no model."""

    def check(self, bundle: Bundle) -> None:
        raise UnsupportedModel("bnb_int8 does not admit this model.")


@pytest.mark.parametrize("technique", [Broken(), Refusing()], ids=["breaks", "refuses"])
def test_failed_build_leaves_the_pool_as_before(pool: EnginePool, model: str, technique: BnbInt8) -> None:
    base = pool.get(model, **FP32)
    before = (pool.keys(), pool.held_bytes())
    with pytest.raises((RuntimeError, UnsupportedModel)):
        pool.get(model, (technique,), **FP32)
    assert (pool.keys(), pool.held_bytes()) == before
    assert pool.get(model, **FP32) is base
    assert pool.get(model, (BnbInt8(),), **FP32).reports[0].technique == "bnb_int8"  # and the key is not taken


@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/folder", "embedded/no-such-model", "", " ", "a\0b", "x" * 301, "a/b/c", None, 3])
def test_failed_load_leaves_the_pool_as_before(pool: EnginePool, model: str, name: Any) -> None:
    pool.get(model, **FP32)
    before = pool.keys()
    with pytest.raises(FuseboxError):
        pool.get(name, **FP32)
    assert pool.keys() == before
    pool.get(model, (WordRemoval(),), **FP32)  # and the building lock is free


def test_failed_load_is_tried_again(pool: EnginePool, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "load_bundle", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            pool.get(model, **FP32)
    assert isinstance(pool.get(model, **FP32), Engine)


def test_concurrent_requests_build_an_engine_once(pool: EnginePool, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_loads(monkeypatch, delay_s=0.05)
    start, engines = threading.Barrier(8), []

    def work() -> None:
        start.wait()
        engines.append(pool.get(model, (WordRemoval(),), **FP32))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [model]
    assert len({id(e) for e in engines}) == 1
    assert len(engines) == 8


def test_loaded_engine_is_found_while_another_one_is_built(pool: EnginePool, folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pool.get(folders[0], **FP32)
    entered, leave = threading.Event(), threading.Event()

    def load(model_id: str, **settings: Any) -> Bundle:
        entered.set()
        assert leave.wait(60)
        return load_bundle(model_id, **settings)

    monkeypatch.setattr(pool_module, "load_bundle", load)
    builder = threading.Thread(target=pool.get, args=(folders[1],), kwargs=FP32)
    builder.start()
    try:
        assert entered.wait(60)
        began = time.perf_counter()
        pool.get(folders[0], **FP32)
        assert time.perf_counter() - began < 30
    finally:
        leave.set()
        builder.join()


def test_unload_frees_the_model(pool: EnginePool, model: str) -> None:
    engines = [pool.get(model, chain, **FP32) for chain in ((), (WordRemoval(),), (BnbInt8(),))]
    dead = [weakref.ref(part) for e in engines for part in (e, e.bundle.model, e.bundle.model.model.layers[0].mlp.up_proj.weight)]
    del engines
    assert all(ref() is not None for ref in dead)
    assert pool.unload() == 3
    assert [ref() for ref in dead] == [None] * len(dead)
    assert pool.keys() == []
    assert pool.held_bytes() == 0


def test_budget_frees_the_model_it_drops(folders: list[str]) -> None:
    pool = EnginePool(budget_bytes=1)
    dead = weakref.ref(pool.get(folders[0], (BnbInt8(),), **FP32).bundle.model)
    pool.get(folders[1], **FP32)
    assert dead() is None


def test_unload_takes_one_model_only(pool: EnginePool, folders: list[str]) -> None:
    pool.get(folders[0], **FP32)
    pool.get(folders[0], (WordRemoval(),), **FP32)
    pool.get(folders[1], **FP32)
    assert pool.unload(folders[0]) == 2
    assert loaded(pool) == ["b"]
    assert pool.unload(folders[0]) == 0


def timed_as(monkeypatch: pytest.MonkeyPatch, fp32_s: float, bf16_s: float) -> list[torch.dtype]:
    """Decode steps take these times, by the dtype that the weights really have; the returned list grows with each step."""
    order: list[torch.dtype] = []

    def decoder(bundle: Bundle) -> Callable[[], float]:
        def step() -> float:
            order.append(bundle.model.dtype)
            return {torch.float32: fp32_s, torch.bfloat16: bf16_s}[bundle.model.dtype]

        return step

    monkeypatch.setattr(dtype_choice_module, "_decoder", decoder)
    return order


@pytest.mark.parametrize(("fp32_s", "bf16_s", "chosen"), [(0.002, 0.001, "bfloat16"), (0.001, 0.002, "float32")])
def test_baseline_runs_in_the_faster_dtype(pool: EnginePool, model: str, monkeypatch: pytest.MonkeyPatch, fp32_s: float, bf16_s: float, chosen: str) -> None:
    timed_as(monkeypatch, fp32_s, bf16_s)
    engine = pool.get(model)
    choice = pool.dtype_choice(model)
    assert choice is not None
    assert (choice.dtype, engine.bundle.info.dtype) == (chosen, chosen)
    assert {str(p.dtype) for p in engine.bundle.model.parameters()} == {f"torch.{chosen}"}
    assert choice.step_s == {"float32": fp32_s, "bfloat16": bf16_s}
    assert chosen in choice.reason.split(",")[0]
    assert "1.00 ms" in choice.reason.split(",")[0]
    assert "2.00 ms" in choice.reason.split(",")[1]


def test_dtypes_are_timed_in_turns_so_that_neither_always_goes_first(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order = timed_as(monkeypatch, 1, 2)
    faster_dtype(load_bundle(model), lambda: load_bundle(model, dtype="bfloat16"))
    assert [dtype for dtype, _ in groupby(order)] == [torch.float32, torch.bfloat16, torch.float32]
    assert order.count(torch.float32) == order.count(torch.bfloat16) >= 10


def test_choice_rests_on_times_that_were_measured(model: str) -> None:
    _, choice = faster_dtype(load_bundle(model), lambda: load_bundle(model, dtype="bfloat16"))
    measured = {k: v for k, v in choice.step_s.items() if v is not None}
    assert set(measured) == {"float32", "bfloat16"}
    assert all(0 < v < 10 for v in measured.values())
    assert choice.dtype == min(measured, key=lambda k: measured[k])


def test_bf16_that_is_chosen_is_the_model_that_transformers_loads_in_bf16(pool: EnginePool, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Position tables stay fp32 there; rounded to bf16 they would turn far positions by whole radians."""
    timed_as(monkeypatch, 2, 1)
    chosen, loaded_so = pool.get(model).bundle, AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    assert {n: b.dtype for n, b in chosen.model.named_buffers()} == {n: b.dtype for n, b in loaded_so.named_buffers()}
    ids = torch.randint(6, 380, (1, 250), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(chosen.model(input_ids=ids).logits, loaded_so.eval()(input_ids=ids).logits)


def test_bf16_is_not_loaded_without_memory_for_it_and_that_is_said(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype_choice_module, "available_bytes", lambda: 0)
    bundle, choice = faster_dtype(load_bundle(model), lambda: pytest.fail("bf16 was loaded"))
    assert bundle.model.dtype == torch.float32
    assert choice.step_s == {"float32": None}
    assert "memory" in choice.reason


def limit_memory(monkeypatch: pytest.MonkeyPatch, refuses: Callable[[str], bool]) -> list[str]:
    """Loads in the dtypes that `refuses` names fail for want of memory; the returned list grows with each try."""
    tries: list[str] = []

    def load(model_id: str, *, dtype: str, **settings: Any) -> Bundle:
        tries.append(dtype)
        if refuses(dtype):
            raise OutOfMemory("needs 9 GiB, 1 GiB is free.")
        return load_bundle(model_id, dtype=dtype, **settings)

    monkeypatch.setattr(pool_module, "load_bundle", load)
    return tries


def test_model_that_fits_in_bf16_only_runs_in_bf16_and_says_why(pool: EnginePool, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, lambda dtype: dtype == "float32")
    assert pool.get(model).bundle.model.dtype == torch.bfloat16
    choice = pool.dtype_choice(model)
    assert choice is not None
    assert choice.step_s == {"bfloat16": None}  # not timed, so no number
    assert "9 GiB" in choice.reason


def test_engines_make_room_for_a_model_that_does_not_fit_beside_them(pool: EnginePool, folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pool.get(folders[0], **FP32)
    limit_memory(monkeypatch, lambda _: bool(pool.keys()))
    pool.get(folders[1], **FP32)
    assert loaded(pool) == ["b"]


def test_model_that_never_fits_is_refused_with_the_numbers(pool: EnginePool, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = limit_memory(monkeypatch, lambda _: True)
    with pytest.raises(OutOfMemory, match="9 GiB"):
        pool.get(model)
    assert set(tries) == {"float32", "bfloat16"}
    assert pool.keys() == []


def test_number_of_engines_is_bounded_too(pool: EnginePool, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines over shared tensors cost no weights, but each has modules of its own."""
    monkeypatch.setattr(pool_module, "MAX_ENGINES", 3)
    for every in (3, 4, 5):
        pool.get(model, (WordRemoval(every=every),), **FP32)
    assert [key.method for key in pool.keys()] == ["word_removal:every=4", "baseline", "word_removal:every=5"]


def test_engines_of_one_model_keep_one_dtype_when_the_baseline_is_loaded_again(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tight budget drops the baseline; timed anew it might differ from the fused engine it is compared with."""
    pool = EnginePool(budget_bytes=1)
    timed_as(monkeypatch, 2, 1)
    fused = pool.get(model, (WordRemoval(),))
    timed_as(monkeypatch, 1, 2)
    assert pool.get(model).bundle.info.dtype == fused.bundle.info.dtype


def test_no_dtype_choice_where_the_dtype_was_asked_for_or_nothing_is_loaded(pool: EnginePool, model: str) -> None:
    pool.get(model, **FP32)
    assert pool.dtype_choice(model, dtype="float32") is None
    assert pool.dtype_choice(model) is None
    pool.get(model)
    assert pool.dtype_choice(model) is not None
    pool.unload()
    assert pool.dtype_choice(model) is None


@pytest.mark.parametrize("value", ["float16", "int8", "", "FLOAT32", "x" * 1000, None, 3, ["float32"]])
def test_unknown_dtype_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="use auto, float32 or bfloat16") as refusal:
        check_dtype(value)
    assert len(str(refusal.value)) < 150


def test_local_folders_can_be_closed(model: str) -> None:
    with pytest.raises(ModelNotFound, match="local folders are closed"):
        EnginePool(allow_local=False).get(model, **FP32)
