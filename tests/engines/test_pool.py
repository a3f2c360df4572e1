"""The pool: one engine per key, a byte budget, and a baseline in the faster dtype."""

from __future__ import annotations

import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engines.dtype_choice as dtype_choice_module
import engines.pool as pool_module
from compression.quant.technique import BnbInt8
from core.bundle import Bundle
from core.errors import FuseboxError, InvalidRequest, ModelNotFound, UnsupportedModel
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
    return [Path(key.model_id).name for key in pool.keys()]  # noqa: SIM118 (not a mapping)


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
        assert leave.wait(10)
        return load_bundle(model_id, **settings)

    monkeypatch.setattr(pool_module, "load_bundle", load)
    builder = threading.Thread(target=pool.get, args=(folders[1],), kwargs=FP32)
    builder.start()
    try:
        assert entered.wait(10)
        began = time.perf_counter()
        pool.get(folders[0], **FP32)
        assert time.perf_counter() - began < 1
    finally:
        leave.set()
        builder.join()


def test_unload_frees_the_model(pool: EnginePool, model: str) -> None:
    engines = [pool.get(model, chain, **FP32) for chain in ((), (WordRemoval(),), (BnbInt8(),))]
    dead = [weakref.ref(part) for e in engines for part in (e, e.bundle.model, e.bundle.model.model.layers[0].mlp.up_proj.weight)]
    del engines
    assert all(ref() is not None for ref in dead)
    assert pool.unload() == 3
    gc.collect()
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


def times(fp32_s: float, bf16_s: float) -> Callable[[Bundle], float]:
    """Step times by the dtype that the bundle's weights really have."""
    return lambda bundle: {torch.float32: fp32_s, torch.bfloat16: bf16_s}[bundle.model.dtype]


@pytest.mark.parametrize(("fp32_s", "bf16_s", "chosen"), [(0.002, 0.001, "bfloat16"), (0.001, 0.002, "float32")])
def test_baseline_runs_in_the_faster_dtype(pool: EnginePool, model: str, monkeypatch: pytest.MonkeyPatch, fp32_s: float, bf16_s: float, chosen: str) -> None:
    monkeypatch.setattr(dtype_choice_module, "_step_time", times(fp32_s, bf16_s))
    engine = pool.get(model)
    choice = pool.dtype_choice(model)
    assert choice is not None
    assert (choice.dtype, engine.bundle.info.dtype) == (chosen, chosen)
    assert {str(p.dtype) for p in engine.bundle.model.parameters()} == {f"torch.{chosen}"}
    assert choice.step_s == {"float32": fp32_s, "bfloat16": bf16_s}
    assert chosen in choice.reason.split(",")[0]
    assert "1.00 ms" in choice.reason.split(",")[0]
    assert "2.00 ms" in choice.reason.split(",")[1]


def test_choice_rests_on_times_that_were_measured(model: str) -> None:
    _, choice = faster_dtype(load_bundle(model))
    measured = {k: v for k, v in choice.step_s.items() if v is not None}
    assert set(measured) == {"float32", "bfloat16"}
    assert all(0 < v < 10 for v in measured.values())
    assert choice.dtype == min(measured, key=lambda k: measured[k])


def test_bf16_that_is_chosen_is_the_model_that_transformers_loads_in_bf16(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Position tables stay fp32 there; rounded to bf16 they would turn far positions by whole radians."""
    monkeypatch.setattr(dtype_choice_module, "_step_time", times(2, 1))
    chosen, _ = faster_dtype(load_bundle(model))
    loaded_so = load_bundle(model, dtype="bfloat16")
    assert {n: b.dtype for n, b in chosen.model.named_buffers()} == {n: b.dtype for n, b in loaded_so.model.named_buffers()}
    ids = torch.randint(6, 380, (1, 250), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(chosen.model(input_ids=ids).logits, loaded_so.model(input_ids=ids).logits)


def test_timing_leaves_the_fp32_model_as_it_was(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype_choice_module, "_step_time", times(2, 1))
    bundle = load_bundle(model)
    before = {n: t.clone() for n, t in bundle.model.state_dict().items()}
    faster_dtype(bundle)
    assert all(torch.equal(before[n], t) and t.dtype == before[n].dtype for n, t in bundle.model.state_dict().items())


def test_bf16_is_not_timed_without_memory_for_it_and_that_is_said(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype_choice_module, "available_bytes", lambda: 0)
    bundle, choice = faster_dtype(load_bundle(model))
    assert bundle.model.dtype == torch.float32
    assert choice.step_s == {"float32": None}
    assert "memory" in choice.reason


def test_engines_of_one_model_keep_one_dtype_when_the_baseline_is_loaded_again(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tight budget drops the baseline; timed anew it might differ from the fused engine it is compared with."""
    pool = EnginePool(budget_bytes=1)
    monkeypatch.setattr(dtype_choice_module, "_step_time", times(2, 1))
    fused = pool.get(model, (WordRemoval(),))
    monkeypatch.setattr(dtype_choice_module, "_step_time", times(1, 2))
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
