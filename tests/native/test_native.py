"""The native runtime against the torch executor: every family, plain and with each technique that changes what decode computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from core.architectures import FAMILIES
from core.bundle import Bundle
from core.decoding import decode_one_token, prefill
from core.errors import FuseboxError, InvalidRequest
from core.progress import Stop
from core.technique import Label
from engines.engine import Engine, fused_engine
from engines.methods import parse_method
from engines.native.program import SELECT
from engines.native.technique import NativeRuntime
from kernels.build import native
from kernels.kv_memory.cache import TokenMajorCache
from tests import contract
from tests.tolerances import NATIVE, NATIVE_BF16

BundleOf = Callable[[str], Bundle]
NATIVE_FAMILIES = sorted(set(FAMILIES) - {"opt_post_norm"})
METHODS = (
    "native", "native+vattention", "native+int8", "native+int4", "native+larosa:sparsity=0.4", "native+larosa:sparsity=0.4,variant=larosa_threshold",
    "native+larosa:sparsity=0.5,variant=online_rotation", "native+larosa:sparsity=0.5,variant=topk", "native+int8+larosa:sparsity=0.5", "native+int4:group_size=32+larosa:sparsity=0.25",
)
PROMPT = contract.PROMPT
STEPS = 64


@pytest.fixture(autouse=True)
def compiled() -> None:
    if native().library is None:
        pytest.skip(f"NOT RUN: {native().reason}")


def with_method(bundle: Bundle, method: str) -> Engine:
    try:
        return fused_engine(bundle, parse_method(method))
    except FuseboxError as error:
        pytest.skip(f"NOT RUN: {error}")


def torch_twin(engine: Engine) -> Bundle:
    """The same modules, decoded by torch."""
    twin = engine.bundle.clone()
    assert twin.decoder is None
    return twin


@torch.inference_mode()
def take_over(theirs: Any, ours: TokenMajorCache) -> None:
    """Go on from torch's keys and values, so that one step's difference is not counted in the next."""
    for layer, source in zip(ours.layers, theirs.layers, strict=True):
        for name in ("keys", "values"):
            layer.storage.tensors[name][: layer.length] = getattr(source, name)[0].transpose(0, 1) if isinstance(source, DynamicLayer) else source.storage.tensors[name][: source.length]


def prompt_ids(bundle: Bundle) -> list[int]:
    return [int(i) for i in bundle.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]][:40]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_native_decode_equals_torch(family: str, method: str, family_bundle: BundleOf) -> None:
    """64 greedy steps, each over the same tokens: logits to 1e-3, the same choice, but where two logits are as near as rounding."""
    engine = with_method(family_bundle(family), method)
    assert engine.bundle.decoder is not None, engine.reports[-1].notes
    twin, ids = torch_twin(engine), prompt_ids(engine.bundle)
    ours, theirs = engine.bundle.cache_factory(), twin.cache_factory()
    a, b = prefill(engine.bundle, ids, ours, Stop()), prefill(twin, ids, theirs, Stop())
    assert a is not None and b is not None
    apart = 0
    for _ in range(STEPS):
        token = int(b.argmax())
        a, b = decode_one_token(engine.bundle, token, ours), decode_one_token(twin, token, theirs)
        if not NATIVE.holds(a, b):
            apart += 1
            take_over(theirs, ours)
            continue
        top = b.topk(2).values
        assert int(a.argmax()) == int(b.argmax()) or top[0] - top[1] < 2 * NATIVE.atol
    allowed = STEPS // 16 if "larosa" in method else 0  # an entry as near the threshold as rounding may fall on either side
    assert apart <= allowed, f"{apart} of {STEPS} steps differ"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("method", ["native+larosa:sparsity=0.4", "native+int8+larosa:sparsity=0.5", "native+int4:group_size=32+larosa:sparsity=0.25", "native+int8"])
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_rows_that_lie_together_and_other_thread_counts_compute_the_same(family: str, method: str, threads: int, family_bundle: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model larger than the caches runs: layers over the same input side by side, input channels shared out between the threads."""
    monkeypatch.setattr("engines.native.compiler.last_level_cache_bytes", lambda: 0)
    monkeypatch.setattr("engines.native.technique.torch.get_num_threads", lambda: threads)
    test_native_decode_equals_torch(family, method, family_bundle)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_bf16_weights_are_nearer_to_fp32_in_c_than_in_torch(family: str, family_bundle: BundleOf) -> None:
    bundle = family_bundle(family)
    bundle.model.to(torch.bfloat16)
    engine = fused_engine(bundle, [NativeRuntime()])
    ids = prompt_ids(bundle)
    wide = Bundle(copy.deepcopy(bundle.model).float(), bundle.tokenizer, bundle.info)
    rows = []
    for which in (engine.bundle, torch_twin(engine), wide):
        cache = which.cache_factory()
        logits = prefill(which, ids, cache, Stop())
        assert logits is not None
        rows.append(torch.stack([decode_one_token(which, token, cache).float() for token in ids[:12]]))
    spread = float(rows[2].std())
    assert float((rows[0] - rows[2]).abs().max()) <= NATIVE_BF16 * spread
    assert float((rows[0] - rows[2]).norm()) <= 1.1 * float((rows[1] - rows[2]).norm())


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("method", ["native", "native+int4", "native+larosa:sparsity=0.5"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_tokens_at_once_equal_one_after_the_other(family: str, method: str, count: int, family_bundle: BundleOf) -> None:
    engine = with_method(family_bundle(family), method)
    decoder, ids = engine.bundle.decoder, prompt_ids(engine.bundle)
    assert decoder is not None
    one, many = engine.bundle.cache_factory(), engine.bundle.cache_factory()
    for cache in (one, many):
        prefill(engine.bundle, ids[:20], cache, Stop())
    single = torch.stack([decoder([token], one)[0].clone() for token in ids[20 : 20 + count]])
    together = decoder(ids[20 : 20 + count], many).clone()
    assert NATIVE.holds(together, single)
    assert one.length == many.length == 20 + count


def test_threads_do_not_change_the_result(llama: Bundle) -> None:
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        try:
            engine = fused_engine(llama, parse_method("native+larosa:sparsity=0.5"))
        finally:
            torch.set_num_threads(before)
        assert engine.bundle.decoder.compiled.program.threads == threads  # type: ignore[union-attr]
        results.append(contract_logits(engine.bundle))
    for other in results[1:]:
        assert torch.equal(other, results[0]), "each output is summed by one thread, whichever it is"


def contract_logits(bundle: Bundle) -> torch.Tensor:
    cache, ids = bundle.cache_factory(), prompt_ids(bundle)
    prefill(bundle, ids[:10], cache, Stop())
    return torch.stack([decode_one_token(bundle, token, cache) for token in ids[10:30]])


def test_the_runtime_counts_its_steps_and_undo_is_exact(llama: Bundle) -> None:
    before = contract.snapshot(llama)
    applied = NativeRuntime().apply(llama, NativeRuntime().prepare(llama))
    contract_logits(llama)
    assert llama.decoder.steps == 20  # type: ignore[union-attr]
    for touched in applied.report.touched:
        assert touched in ("decoder", "native_weights", "cache_factory")
    applied.undo()
    contract.assert_unchanged(before, llama, "undone")
    assert llama.decoder is None


def test_measured_sparsity_is_what_c_left_out(llama: Bundle) -> None:
    engine = fused_engine(llama, parse_method("native+larosa:sparsity=0.5"))
    contract_logits(engine.bundle)
    compiled = engine.bundle.decoder.compiled  # type: ignore[union-attr]
    steps = engine.bundle.decoder.steps  # type: ignore[union-attr]
    for kept, site in zip(compiled.program.kept_rows(), compiled.sites, strict=True):
        assert kept == steps * site.keep, f"{site.kind}: {kept} rows read in {steps} steps"
    assert any(o.kind == SELECT for o in compiled.program.program.operations)


def test_relu_zeros_are_left_out_without_loss(family_bundle: BundleOf) -> None:
    engine = fused_engine(family_bundle("opt"), parse_method("native+larosa:sparsity=0.0"))
    contract_logits(engine.bundle)
    compiled = engine.bundle.decoder.compiled  # type: ignore[union-attr]
    kinds = {site.kind for site in compiled.sites}
    assert kinds == {"down"}, "at sparsity 0 only exact zeros are left out"
    assert sum(compiled.program.kept_rows()) < 0.9 * sum(site.width for site in compiled.sites) * engine.bundle.decoder.steps  # type: ignore[union-attr]


def test_labels_say_executed_only_where_c_runs(llama: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {r.technique: r.label for r in fused_engine(llama, parse_method("native+int8+larosa:sparsity=0.4")).reports}
    assert labels == {"larosa": Label.EXECUTED, "int8": Label.EXECUTED, "native": Label.EXECUTED}
    monkeypatch.setenv("FUSEBOX_NATIVE", "0")
    engine = fused_engine(llama, parse_method("native+int8+larosa:sparsity=0.4"))
    assert {r.technique: r.label for r in engine.reports} == {"larosa": Label.SIMULATED, "int8": Label.STORED, "native": Label.SIMULATED}
    assert "FUSEBOX_NATIVE" in engine.reports[-1].notes[0] and engine.bundle.decoder is None
    assert contract_logits(engine.bundle).isfinite().all()


@pytest.mark.parametrize(("family", "method", "said"), [
    ("opt_post_norm", "native", "OPT-350M"),
    ("llama", "native+bnb_int8", "bitsandbytes.Linear8bitLt"),
    ("llama", "native+larosa:sparsity=0.2,variant=cats", "behind the gate"),
])
def test_what_has_no_native_counterpart_decodes_in_torch_and_is_named(family: str, method: str, said: str, family_bundle: BundleOf) -> None:
    engine = fused_engine(family_bundle(family), parse_method(method))
    assert engine.bundle.decoder is None and said in engine.reports[-1].skipped["decode"]
    assert contract_logits(engine.bundle).isfinite().all()


def test_a_strange_hook_is_not_silently_left_out(llama: Bundle) -> None:
    llama.model.get_submodule("model.layers.0.mlp").register_forward_hook(lambda module, args, output: output * 0)
    engine = fused_engine(llama, [NativeRuntime()])
    assert engine.bundle.decoder is None and "hook" in engine.reports[-1].skipped["decode"]


def test_beyond_the_context_is_refused_and_the_next_request_works(llama: Bundle) -> None:
    engine = fused_engine(llama, [NativeRuntime()])
    cache, ids = engine.bundle.cache_factory(), prompt_ids(llama)
    prefill(engine.bundle, (ids * 4)[: llama.context_length - 1], cache, Stop())
    decode_one_token(engine.bundle, ids[0], cache)
    with pytest.raises(InvalidRequest, match=f"compiled for {llama.context_length} tokens"):
        decode_one_token(engine.bundle, ids[0], cache)
    assert contract_logits(engine.bundle).isfinite().all()
