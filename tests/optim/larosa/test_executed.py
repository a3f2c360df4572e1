"""LaRoSA's decode steps by Triton against its zeros in torch. Without a CUDA device the executor is chosen as for one and run by Triton's interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch

from core.bundle import Bundle
from core.decoding import decode_one_token, prefill
from core.evaluation import decode_logits
from core.prepared_cache import cached_prepare
from core.progress import Stop
from core.technique import Label, Report
from engines.engine import fused_engine
from kernels.cuda.executor import NoExecutor, sparse_executor
from optim.larosa.executed import SparseReader
from optim.larosa.sites import sites_of
from optim.larosa.structure import structure_of
from optim.larosa.technique import LaRoSA
from tests import contract
from tests.tolerances import NATIVE, SUM_ORDER

BundleOf = Callable[[str], Bundle]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="NOT RUN: Triton is not installed (Linux x86_64 only)")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IDS = list(range(20, 40))
CASES = (*((family, "larosa") for family in ("llama", "gpt2", "phi", "gpt_neox", "opt")), ("llama", "larosa_threshold"), ("llama", "online_rotation"), ("gpt2", "topk"))


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optim.larosa.technique.sparse_executor", lambda kind, device: sparse_executor("cuda", device))


def readers(bundle: Bundle) -> list[SparseReader]:
    return [module for module in bundle.model.modules() if isinstance(module, SparseReader)]


def larosa_report(bundle: Bundle, technique: LaRoSA) -> Report:
    with technique.apply(bundle, cached_prepare(technique, bundle)) as applied:
        return applied.report


@needs_triton
@pytest.mark.parametrize(("family", "variant"), CASES)
def test_executed_decode_equals_zeros_in_torch(family: str, variant: str, family_bundle: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    technique = LaRoSA(sparsity=0.5, variant=variant)
    bundle = family_bundle(family)
    bundle.model.to(DEVICE)
    monkeypatch.setattr("optim.larosa.technique.sparse_executor", lambda kind, device: NoExecutor(None))
    simulated = fused_engine(bundle, [technique])
    monkeypatch.setattr("optim.larosa.technique.sparse_executor", lambda kind, device: sparse_executor("cuda", device))
    executed = fused_engine(bundle, [technique])
    assert simulated.reports[0].label is Label.SIMULATED and executed.reports[0].label is Label.EXECUTED
    assert executed.reports[0].bytes_after == simulated.reports[0].bytes_after, "another layout must not cost a second copy"
    wanted, got = decode_logits(simulated.bundle, IDS[:8], IDS[8:14]), decode_logits(executed.bundle, IDS[:8], IDS[8:14])
    dense = decode_logits(bundle, IDS[:8], IDS[8:14])
    assert NATIVE.holds(got, wanted) and not NATIVE.holds(got, dense)
    found = readers(executed.bundle)
    assert len(found) == len(list(structure_of(bundle.model, "test").layers()))
    assert {reader.sparse_steps for reader in found} == {5}, "every reader leaves weights out at every decode step, and only there"


@needs_triton
@pytest.mark.usefixtures("as_on_cuda")
def test_prompts_of_any_length_and_exempt_positions_run_in_torch(llama: Bundle) -> None:
    llama.model.to(DEVICE)
    engine = fused_engine(llama, [LaRoSA(sparsity=0.5, variant="topk", exempt=4)])
    for ids in (IDS[:1], IDS[:20]):
        ours, theirs = prefill(engine.bundle, ids, engine.bundle.cache_factory(), Stop()), prefill(llama, ids, llama.cache_factory(), Stop())
        assert ours is not None and theirs is not None and SUM_ORDER.holds(ours, theirs)
    cache = engine.bundle.cache_factory()
    prefill(engine.bundle, IDS[:1], cache, Stop())
    for token in IDS[1:4]:
        decode_one_token(engine.bundle, token, cache)
    assert {reader.sparse_steps for reader in readers(engine.bundle)} == {0}
    decode_one_token(engine.bundle, IDS[4], cache)
    assert {reader.sparse_steps for reader in readers(engine.bundle)} == {1}


@needs_triton
@pytest.mark.usefixtures("as_on_cuda")
def test_weights_of_dropped_entries_are_not_read(llama: Bundle) -> None:
    llama.model.to(DEVICE)
    engine = fused_engine(llama, [LaRoSA(sparsity=0.5, variant="topk")])
    cache = engine.bundle.cache_factory()
    prefill(engine.bundle, IDS[:8], cache, Stop())
    for reader in readers(engine.bundle):
        def poisoned(x: torch.Tensor, reader: SparseReader = reader) -> torch.Tensor:
            site = reader._site[0]
            assert site.selection is not None
            clean = reader.weight.data.clone()
            reader.weight.data[:, site.selection.kept.reshape(-1) == 0] = torch.nan
            try:
                return SparseReader.forward(reader, x)
            finally:
                reader.weight.data.copy_(clean)

        reader.forward = poisoned  # type: ignore[method-assign]
    assert decode_one_token(engine.bundle, IDS[8], cache).isfinite().all()


@needs_triton
@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("variant", ["larosa", "topk"])
def test_undo_is_exact_and_the_base_keeps_its_layout(llama: Bundle, variant: str) -> None:
    llama.model.to(DEVICE)
    technique = LaRoSA(sparsity=0.5, variant=variant)
    before = contract.snapshot(llama)
    strides = {name: p.stride() for name, p in llama.model.named_parameters()}
    applied = technique.apply(llama, cached_prepare(technique, llama))
    decode_logits(llama, IDS[:8], IDS[8:12])
    assert {path for path, m in llama.model.named_modules() if isinstance(m, SparseReader)} <= set(applied.report.touched)
    applied.undo()
    contract.assert_unchanged(before, llama, "undone")
    assert strides == {name: p.stride() for name, p in llama.model.named_parameters()}
    assert not any(site.executor for site in sites_of(llama.model)) and not readers(llama)


@needs_triton
@pytest.mark.usefixtures("as_on_cuda")
def test_what_the_kernels_cannot_run_is_simulated_with_the_reason(llama: Bundle) -> None:
    llama.model.to(DEVICE)
    report = larosa_report(llama, LaRoSA(sparsity=0.2, variant="cats"))
    assert report.label is Label.SIMULATED and "cats drops outputs" in report.notes[-1]
    llama.model.double()
    report = larosa_report(llama, LaRoSA(sparsity=0.5, variant="topk"))
    assert report.label is Label.SIMULATED and report.notes[-1].endswith("q_proj is in float64")


def test_without_an_executor_larosa_is_simulated_and_says_why(llama: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(kind: str, device: torch.device) -> NoExecutor:
        asked.append((kind, device))
        return NoExecutor("Triton is not installed (no module); pip install triton")

    monkeypatch.setattr("optim.larosa.technique.sparse_executor", choose)
    report = larosa_report(llama, LaRoSA(sparsity=0.5, variant="topk"))
    assert asked == [("cpu", llama.device)], "the choice is made by the model's device"
    assert report.label is Label.SIMULATED and report.notes[-1].startswith("simulated:") and report.notes[-1].endswith("pip install triton")
    assert not readers(llama)
