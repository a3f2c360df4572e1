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
from transformers import PreTrainedTokenizerBase

from core.bundle import Bundle, ModelInfo
from core.calibration import calibration_windows
from core.decoding import cache_argument, prefill
from core.errors import CalibrationError, IncompatibleTechniques, InvalidRequest, UnsupportedModel
from core.evaluation import decode_logits
from core.phase import reading_prompt
from core.prepared_cache import cache_path, cached_prepare
from core.progress import Progress, Stop
from core.technique import Label
from engines.engine import fused_engine
from engines.methods import make_technique, parse_method
from optim.larosa.allocation import sparse_loss
from optim.larosa.calibration import collect_magnitudes, threshold_for
from optim.larosa.modules import TokenPosition, TopKSite
from optim.larosa.sites import counting, measured, sites_of
from optim.larosa.structure import structure_of
from optim.larosa.technique import VARIANTS, LaRoSA
from tests import families
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


def bundle_of(family: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Bundle:
    return Bundle(families.make_model(family, tokenizer, **changes), tokenizer, ModelInfo(family, None, "float32", "local"))


@pytest.mark.parametrize("variant", ["larosa", "teal"])
def test_little_calibration_text_is_still_calibrated_on(variant: str, tokenizer: PreTrainedTokenizerBase) -> None:
    wide = bundle_of("llama", tokenizer, max_position_embeddings=1024)
    tensors = LaRoSA(variant=variant, calibration_tokens=256).prepare(wide).tensors
    if variant == "larosa":
        assert not torch.allclose(tensors["rotation.0"].abs(), torch.eye(64).flip(-1)), "an identity is no rotation"
    assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("length", [511, 512, 513, 514, 1025])
def test_prompt_stays_dense_whatever_its_length(length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    wide = bundle_of("llama", tokenizer, max_position_embeddings=2048)
    ids = [20 + place % 250 for place in range(length)]
    dense = prefill(wide, ids, wide.cache_factory(), Stop())
    technique = LaRoSA(sparsity=0.75, variant="topk", calibration_tokens=256)
    with technique.apply(wide, cached_prepare(technique, wide)):
        sparse = prefill(wide, ids, wide.cache_factory(), Stop())
    assert dense is not None and sparse is not None and torch.equal(dense, sparse)


@torch.inference_mode()
def test_cache_is_seen_however_it_is_handed_over(llama: Bundle) -> None:
    technique = LaRoSA(sparsity=0.5, variant="topk")
    model: Any = llama.model
    token = torch.tensor([[33]])
    with technique.apply(llama, cached_prepare(technique, llama)):
        sites = sites_of(llama.model)
        for call in (
            lambda cache: model(token, **cache_argument(model, cache)), lambda cache: model(token, None, None, cache), lambda cache: model.model(token, None, None, cache),
        ):
            cache = llama.cache_factory()
            model(torch.tensor([IDS[:20]]), **cache_argument(model, cache))
            with counting(sites):
                call(cache)
            assert measured(structure_of(llama.model, "test"), sites).sparsity == pytest.approx(0.5, abs=0.01)


def test_several_decoded_tokens_at_once_are_sparse_too(llama: Bundle) -> None:
    technique = LaRoSA(sparsity=0.5, variant="topk")
    with technique.apply(llama, cached_prepare(technique, llama)), torch.inference_mode():
        cache = llama.cache_factory()
        prefill(llama, IDS[:20], cache, Stop())
        with counting(sites_of(llama.model)), reading_prompt(False):
            llama.model(input_ids=torch.tensor([IDS[20:23]]), **cache_argument(llama.model, cache))
        assert sum(site.rows for site in sites_of(llama.model) if site.kind == "mlp") == 3 * 2


def test_adapted_head_is_refused(llama: Bundle) -> None:
    class Adapted(nn.Linear):
        """Stands for a head with an adapter."""

    model: Any = llama.model
    model.lm_head = Adapted(64, 300, bias=False)
    with pytest.raises(UnsupportedModel, match=r"the output head is a tests\.Adapted"):
        LaRoSA().check(llama)


def test_model_without_a_final_norm_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UnsupportedModel, match="no norm before its head"):
        LaRoSA().check(bundle_of("opt", tokenizer, _remove_final_layer_norm=True))


def test_epsilon_of_zero_is_an_epsilon(tokenizer: PreTrainedTokenizerBase) -> None:
    bundle = bundle_of("llama", tokenizer, rms_norm_eps=0.0)
    technique = LaRoSA(sparsity=0.0)
    dense = logits(bundle, IDS)
    with technique.apply(bundle, cached_prepare(technique, bundle)):
        assert torch.allclose(logits(bundle, IDS), dense, atol=1e-3)


def test_exemption_of_the_whole_context_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(CalibrationError, match="first 64 positions stay dense, and a window of this model has 64"):
        LaRoSA(exempt=64, calibration_tokens=512).prepare(bundle_of("llama", tokenizer, max_position_embeddings=64))


def test_thresholds_see_every_channel(tokenizer: PreTrainedTokenizerBase) -> None:
    bundle = bundle_of("llama", tokenizer, max_position_embeddings=1024, intermediate_size=1024, num_hidden_layers=1)
    with torch.no_grad():
        bundle.model.get_parameter("model.layers.0.mlp.up_proj.weight")[::2] *= 0.05
    structure = structure_of(bundle.model, "test")
    window = calibration_windows(bundle, None, 512, 512)[0]
    found = collect_magnitudes(structure, [window], 4, ("down",), lambda fraction, text: None)["down.0"]
    seen: list[torch.Tensor] = []
    bundle.model.get_submodule("model.layers.0.mlp.down_proj").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(bundle, window[0].tolist())
    assert float((seen[0][:, 4:].abs() < threshold_for(found, 0.5)).float().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("variant", ["larosa_threshold", "one_rotation_threshold", "teal", "cats"])
def test_thresholds_leave_out_about_what_was_asked_on_like_text(variant: str, tokenizer: PreTrainedTokenizerBase) -> None:
    bundle = bundle_of("llama", tokenizer, max_position_embeddings=1024)
    technique = LaRoSA(sparsity=0.4, variant=variant, calibration_tokens=4096)
    prepared = cached_prepare(technique, bundle)
    with technique.apply(bundle, prepared):
        sites, structure = sites_of(bundle.model), structure_of(bundle.model, "test")
        with counting(sites):
            sparse_loss(structure, sites, calibration_windows(bundle, None, 8192, 1024)[-3:], 4)
        assert measured(structure, sites).sparsity == pytest.approx(0.4, abs=0.02)


def test_kept_preparation_is_that_of_this_configuration_tokenizer_text_and_code(llama: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    technique = LaRoSA()
    paths = {cache_path(technique, llama, None), cache_path(technique, llama, ["a", "b"]), cache_path(technique, llama, ["a\0b"])}
    llama.model.config.rms_norm_eps = 0.1
    paths.add(cache_path(technique, llama, None))
    llama.tokenizer.bos_token = llama.tokenizer.eos_token
    paths.add(cache_path(technique, llama, None))
    monkeypatch.setattr("core.calibration.project_texts", lambda: ["other text"])
    paths.add(cache_path(technique, llama, None))
    monkeypatch.setattr("core.prepared_cache.code_digest", lambda technique: "other code")
    paths.add(cache_path(technique, llama, None))
    assert len(paths) == 7


def test_notes_give_what_is_kept_not_what_was_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    bundle = bundle_of("gpt_neox", tokenizer, num_hidden_layers=1)
    technique = LaRoSA(sparsity=0.4, variant="topk", calibration_tokens=1024)
    with technique.apply(bundle, cached_prepare(technique, bundle)) as applied:
        keeps = {site.kind: site.keep / site.width for site in sites_of(bundle.model) if isinstance(site, TopKSite)}
    for kind, share in keeps.items():
        assert f"{share:.1%} of {kind} inputs" in applied.report.notes[0]


def test_positions_of_two_threads_do_not_mix() -> None:
    position = TokenPosition()
    position.start = 7
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(position.start))
    thread.start()
    thread.join()
    assert seen == [0] and position.start == 7
