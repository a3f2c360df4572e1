"""LaRoSA as a technique: what stays dense, what is refused, what is kept between runs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.bundle import Bundle
from core.errors import CalibrationError, IncompatibleTechniques, InvalidRequest, UnsupportedModel
from core.evaluation import decode_logits
from core.prepared_cache import cache_path, cached_prepare
from core.progress import Progress
from core.technique import Label
from engines.engine import fused_engine
from engines.methods import make_technique, parse_method
from optim.larosa.modules import TokenPosition
from optim.larosa.sites import sites_of
from optim.larosa.technique import VARIANTS, LaRoSA
from tests.contract import assert_unchanged, snapshot

BundleOf = Callable[[str], Bundle]
IDS = list(range(20, 60))


@torch.inference_mode()
def logits(bundle: Bundle, ids: list[int]) -> torch.Tensor:
    return bundle.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def test_prompt_stays_dense_unless_asked(llama: Bundle) -> None:
    dense = logits(llama, IDS)
    technique = LaRoSA(sparsity=0.5, variant="topk")
    prepared = cached_prepare(technique, llama)
    with technique.apply(llama, prepared):
        assert torch.equal(logits(llama, IDS), dense)
        assert not torch.equal(decode_logits(llama, IDS[:20], IDS[20:])[1:], dense[20:-1])
    with LaRoSA(sparsity=0.5, variant="topk", prefill=True).apply(llama, prepared):
        sparse = logits(llama, IDS)
    assert torch.equal(sparse[:4], dense[:4])
    assert not torch.allclose(sparse[4:], dense[4:], atol=1e-3)


@pytest.mark.parametrize("exempt", [0, 1, 7])
def test_first_positions_stay_dense_in_decode_too(exempt: int, llama: Bundle) -> None:
    dense = decode_logits(llama, IDS[:2], IDS[2:12])
    technique = LaRoSA(sparsity=0.5, variant="topk", exempt=exempt)
    with technique.apply(llama, cached_prepare(technique, llama)):
        sparse = decode_logits(llama, IDS[:2], IDS[2:12])
    moved = (sparse - dense).abs().amax(-1) > 1e-4
    assert moved.tolist() == [place >= max(2, exempt) for place in range(1, len(moved) + 1)]


def test_tokens_differ_in_count_only_with_thresholds(llama: Bundle) -> None:
    counts: dict[str, set[int]] = {}
    for variant in ("larosa", "larosa_threshold"):
        technique = LaRoSA(sparsity=0.5, variant=variant, prefill=True)
        with technique.apply(llama, cached_prepare(technique, llama)):
            site = next(s for s in sites_of(llama.model) if s.kind == "mlp")
            seen = counts.setdefault(variant, set())
            site.register_forward_hook(lambda module, args, output, seen=seen: seen.add(int(output[0, -1].count_nonzero())))
            decode_logits(llama, IDS[:5], IDS[5:25])
    assert len(counts["larosa"]) == 1
    assert len(counts["larosa_threshold"]) > 1


def test_report_says_simulated_and_what_is_dropped(llama: Bundle) -> None:
    engine = fused_engine(llama, [LaRoSA()])
    report = engine.reports[0]
    assert report.label is Label.SIMULATED
    assert any("simulated" in note for note in report.notes)
    assert report.bytes_after > report.bytes_before, "the untied head and the adapters cost bytes, and the report must say so"


def test_tied_head_is_untied_in_the_copy_only(llama: Bundle) -> None:
    model: Any = llama.model
    assert model.config.tie_word_embeddings
    engine = fused_engine(llama, [LaRoSA()])
    fused: Any = engine.bundle.model
    assert fused.lm_head.weight is not fused.model.embed_tokens.weight
    assert not fused.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan, math.inf, "half", None, True])
def test_sparsity_out_of_range_is_refused_with_the_value(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="larosa: sparsity is"):
        make_technique("larosa", {"sparsity": value})


def test_unknown_variant_is_refused_with_the_list() -> None:
    with pytest.raises(InvalidRequest, match="choose one of larosa"):
        parse_method("larosa:variant=dejavu")


def test_short_calibration_text_is_refused_with_both_numbers(llama: Bundle) -> None:
    with pytest.raises(CalibrationError, match=r"has \d+ tokens; \d+ are needed"):
        LaRoSA().prepare(llama, ["Too short."])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_weights_are_refused_by_name(bad: float, llama: Bundle) -> None:
    with torch.no_grad():
        llama.model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = bad
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        fused_engine(llama, [LaRoSA()])


@pytest.mark.parametrize("name", ["bnb_int8", "bnb_nf4"])
def test_quantised_weights_underneath_are_refused(name: str, llama: Bundle) -> None:
    with pytest.raises(IncompatibleTechniques, match="full-precision"):
        parse_method(f"{name}+larosa")
    engine = fused_engine(llama, parse_method(name))
    before = snapshot(engine.bundle)
    with pytest.raises(UnsupportedModel, match=r"q_proj is a bitsandbytes\."):
        LaRoSA().check(engine.bundle)
    assert_unchanged(before, engine.bundle, "refused")


def test_adapters_are_refused_by_path(llama: Bundle) -> None:
    class LoraLinear(nn.Linear):
        """Stands for a layer with an adapter."""

    block: Any = llama.model.get_submodule("model.layers.1.self_attn")
    block.v_proj = LoraLinear(64, 32, bias=False)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.self_attn\.v_proj is a tests\.LoraLinear\. Merge adapters"):
        LaRoSA().check(llama)


def test_cats_says_how_far_it_reaches_and_what_it_needs(llama: Bundle, family_bundle: BundleOf) -> None:
    with pytest.raises(UnsupportedModel, match=r"at most \d\d% of the blocks' weight bytes"):
        LaRoSA(sparsity=0.9, variant="cats").check(llama)
    with pytest.raises(UnsupportedModel, match="no gate"):
        LaRoSA(sparsity=0.0, variant="cats").check(family_bundle("gpt2"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_preparation_is_kept_for_other_sparsities_and_made_again_for_other_weights(
    variant: str, llama: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FUSEBOX_CACHE", str(tmp_path))
    calls: list[float] = []
    prepare = LaRoSA.prepare

    def counted(self: LaRoSA, bundle: Bundle, data: Any = None, progress: Progress = lambda f, m: None) -> Any:
        calls.append(self.sparsity)
        return prepare(self, bundle, data, progress)

    monkeypatch.setattr(LaRoSA, "prepare", counted)
    first = cached_prepare(LaRoSA(sparsity=0.2, variant=variant), llama)
    again = cached_prepare(LaRoSA(sparsity=0.3, variant=variant, prefill=True), llama)
    assert calls == [0.2]
    assert again.meta == first.meta and all(torch.equal(again.tensors[k], v) for k, v in first.tensors.items())
    with torch.no_grad():
        llama.model.get_parameter("model.norm.weight")[0] += 1
    cached_prepare(LaRoSA(sparsity=0.2, variant=variant), llama)
    assert len(calls) == 2


def test_broken_file_is_made_again_and_an_unwritable_folder_is_no_error(llama: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEBOX_CACHE", str(tmp_path))
    technique = LaRoSA()
    path = cache_path(technique, llama, None)
    whole = cached_prepare(technique, llama)
    path.write_bytes(path.read_bytes()[:100])
    again = cached_prepare(technique, llama)
    assert all(torch.equal(again.tensors[k], v) for k, v in whole.tensors.items())
    assert path.stat().st_size > 1000
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FUSEBOX_CACHE", str(tmp_path / "file"))
    assert cached_prepare(technique, llama).meta == whole.meta


def test_calibration_on_other_text_gives_another_file_and_other_rotations(llama: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEBOX_CACHE", str(tmp_path))
    texts = [" ".join(f"{n} plus {n} is {2 * n}." for n in range(3000))]
    technique = LaRoSA(calibration_tokens=1024)
    assert cache_path(technique, llama, texts) != cache_path(technique, llama, None)
    own, other = cached_prepare(technique, llama), cached_prepare(technique, llama, texts)
    assert not torch.allclose(own.tensors["rotation.0"], other.tensors["rotation.0"])


def test_positions_of_two_threads_do_not_mix() -> None:
    position = TokenPosition()
    position.start = 7
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(position.start))
    thread.start()
    thread.join()
    assert seen == [0] and position.start == 7
