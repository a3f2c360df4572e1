"""Loading: every family comes back bit for bit; whatever is wrong with a checkpoint is said in words before anything runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from core import loading
from core.architectures import FAMILIES
from core.errors import FuseboxError, HubUnavailable, InvalidRequest, ModelLoadError, ModelNotFound, OutOfMemory, UnsafeCheckpoint
from core.loading import checkpoint_elements, load_bundle
from core.units import format_bytes
from tests import contract, families
from tests.tolerances import SUM_ORDER

CheckpointOf = Callable[[str], Path]


@pytest.fixture
def spoiled(family_checkpoint: CheckpointOf, tmp_path: Path) -> Callable[..., Path]:
    """`spoiled("gpt2")`: a copy of a family's checkpoint that a test may break."""

    def copy(family: str = "llama") -> Path:
        return Path(shutil.copytree(family_checkpoint(family), tmp_path / f"{family}-spoiled"))

    return copy


def change_config(folder: Path, **changes: Any) -> Path:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# What loads.


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_family_loads_with_the_saved_weights_and_decodes_greedily(family: str, family_checkpoint: CheckpointOf, tokenizer: PreTrainedTokenizerBase) -> None:
    bundle = load_bundle(str(family_checkpoint(family)))
    saved = families.make_model(family, tokenizer)
    ids = torch.tensor([tokenizer(contract.PROMPT, add_special_tokens=False)["input_ids"]])
    loaded, wanted = bundle.model.state_dict(), saved.state_dict()
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
    with torch.inference_mode():
        assert SUM_ORDER.holds(bundle.model(input_ids=ids).logits, saved(input_ids=ids).logits)
        written = bundle.model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        slow = ids
        for _ in range(8):  # no cache, one whole forward per token
            logits = saved(input_ids=slow, use_cache=False).logits[0, -1]
            logits[tokenizer.eos_token_id] = -torch.inf
            slow = torch.cat([slow, logits.argmax().view(1, 1)], dim=1)
    assert written.tolist() == slow.tolist()
    assert bundle.info.source == "local" and bundle.info.dtype == "float32" and bundle.info.revision
    assert bundle.tokenizer(contract.PROMPT)["input_ids"] == tokenizer(contract.PROMPT)["input_ids"]


def test_loaded_model_is_frozen_and_in_eval_mode(family_checkpoint: CheckpointOf) -> None:
    model = load_bundle(str(family_checkpoint("gpt2"))).model
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_in_the_dtype_asked_for(dtype: str, family_checkpoint: CheckpointOf, tokenizer: PreTrainedTokenizerBase) -> None:
    bundle = load_bundle(str(family_checkpoint("llama")), dtype=dtype)
    wanted = getattr(torch, dtype)
    assert {p.dtype for p in bundle.model.parameters()} == {wanted} and bundle.info.dtype == dtype
    saved = families.make_model("llama", tokenizer)
    assert torch.equal(bundle.model.model.norm.weight, saved.model.norm.weight.to(wanted))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "opt_post_norm"])
def test_tied_weights_are_tied_again(family: str, family_checkpoint: CheckpointOf) -> None:
    folder = family_checkpoint(family)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_bundle(str(folder)).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight.abs().sum() > 0


def test_tied_weights_saved_under_the_heads_name_load_too(spoiled: Callable[..., Path], family_checkpoint: CheckpointOf) -> None:
    folder = change_weights(spoiled("llama"), lambda state: state.update({"lm_head.weight": state.pop("model.embed_tokens.weight")}))
    whole, renamed = load_bundle(str(family_checkpoint("llama"))), load_bundle(str(folder))
    assert renamed.model.lm_head.weight is renamed.model.model.embed_tokens.weight
    assert torch.equal(renamed.model.lm_head.weight, whole.model.lm_head.weight)
    assert SUM_ORDER.holds(contract.logits_of(renamed), contract.logits_of(whole))


def test_generation_settings_of_the_checkpoint_do_not_choose_the_sampling(spoiled: Callable[..., Path]) -> None:
    folder = spoiled("llama")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 1.9, "top_k": 3, "eos_token_id": [2, 4], "bos_token_id": 1}))
    settings = load_bundle(str(folder)).model.generation_config
    assert not settings.do_sample and settings.temperature in (None, 1.0) and settings.top_k in (None, 50)
    assert settings.eos_token_id == [2, 4] and settings.bos_token_id == 1


def test_progress_goes_from_reading_to_loaded(family_checkpoint: CheckpointOf) -> None:
    seen: list[tuple[float, str]] = []
    load_bundle(str(family_checkpoint("llama")), progress=lambda fraction, message: seen.append((fraction, message)))
    assert seen[-1][0] == 1.0 and "is loaded" in seen[-1][1]
    assert [f for f, _ in seen] == sorted(f for f, _ in seen)


def test_revision_of_a_local_folder_changes_with_its_weights(spoiled: Callable[..., Path], family_checkpoint: CheckpointOf) -> None:
    before = load_bundle(str(family_checkpoint("llama"))).info.revision
    assert load_bundle(str(family_checkpoint("llama"))).info.revision == before
    folder = change_weights(spoiled("llama"), lambda state: state["model.norm.weight"].add_(1.0))
    assert load_bundle(str(folder)).info.revision != before


def test_real_model_of_the_shared_data_loads(stories260k: Any) -> None:
    assert sum(p.numel() for p in stories260k.model.parameters()) == 260_032
    assert stories260k.context_length == 512


# Embedded models.


def test_embedded_models_are_named_after_their_folders_and_chat_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family_checkpoint: CheckpointOf) -> None:
    for name, family in (("chat", "llama"), ("reader", "gpt2")):
        shutil.copytree(family_checkpoint(family), tmp_path / name)
    (tmp_path / "notes").mkdir()
    monkeypatch.setattr(loading, "EMBEDDED_FOLDER", tmp_path)
    assert loading.embedded_models() == {"embedded": tmp_path / "chat", "embedded/reader": tmp_path / "reader"}
    bundle = load_bundle("embedded", allow_local=False)
    assert bundle.info.source == "embedded" and bundle.model.config.model_type == "llama"
    assert load_bundle("embedded/reader", allow_local=False).model.config.model_type == "gpt2"


def test_unknown_embedded_model_is_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family_checkpoint: CheckpointOf) -> None:
    shutil.copytree(family_checkpoint("llama"), tmp_path / "chat")
    monkeypatch.setattr(loading, "EMBEDDED_FOLDER", tmp_path)
    with pytest.raises(ModelNotFound, match=r"no embedded model 'embedded/other'; there are: embedded\."):
        load_bundle("embedded/other")


# What is no model id.


@pytest.mark.parametrize("model_id", ["", "   ", None, 5, ["a/b"], "a\0b", "x" * 301], ids=repr)
def test_junk_is_no_model_id(model_id: Any) -> None:
    with pytest.raises(InvalidRequest, match="use embedded, owner/name"):
        load_bundle(model_id)


@pytest.mark.parametrize("model_id", ["../x", "./x", "/no/such/folder", "~/no-such-folder", "a;rm", "word", "a/b/c", "C:\\model", "a\\b", "..", "~"])
@pytest.mark.parametrize("allow_local", [True, False])
def test_what_is_neither_folder_nor_hub_id_is_not_found(model_id: str, allow_local: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "fetch", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    try:
        load_bundle(model_id, allow_local=allow_local)
    except ModelNotFound as error:
        assert repr(model_id) in str(error) and "owner/name" in str(error)
        assert ("closed" in str(error)) is not allow_local
    except UnsafeCheckpoint as error:  # `..` is a folder, of no model
        assert allow_local and model_id == ".." and "no model folder" in str(error)
    else:
        pytest.fail("it loaded")


@pytest.mark.parametrize("model_id", ["owner/na;me", "a b/c", "a/..", "../a", "owner/name\n", "öwner/name", "a/" + "b" * 200])
def test_what_the_hub_cannot_have_is_an_invalid_request_or_not_found(model_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InvalidRequest, ModelNotFound), match="(not a model id|not a hub id)"):
        load_bundle(model_id)


def test_a_word_of_300_characters_is_refused_in_words() -> None:
    with pytest.raises(FuseboxError):
        load_bundle("x" * 300)


def test_the_home_of_nobody_is_refused_in_words() -> None:
    with pytest.raises(FuseboxError):
        load_bundle("~nosuchuser/model")


def test_local_folders_can_be_closed(family_checkpoint: CheckpointOf, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = family_checkpoint("llama")
    load_bundle(str(folder), allow_local=True)
    with pytest.raises(ModelNotFound, match="local folders are closed here"):
        load_bundle(str(folder), allow_local=False)


def test_closed_local_folders_do_not_shadow_a_hub_id(family_checkpoint: CheckpointOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(family_checkpoint("llama"), tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert load_bundle("owner/name").info.source == "local"
    with pytest.raises(HubUnavailable):
        load_bundle("owner/name", allow_local=False)


@pytest.mark.parametrize("dtype", ["int8", "", "Float32", "auto", None, "torch.float32"])
def test_unknown_dtype_is_refused_with_the_choices(dtype: Any, family_checkpoint: CheckpointOf) -> None:
    with pytest.raises(InvalidRequest, match="use one of float32, bfloat16, float16"):
        load_bundle(str(family_checkpoint("llama")), dtype=dtype)


def test_hub_model_that_is_not_on_this_disk_is_unavailable_offline() -> None:
    with pytest.raises(HubUnavailable, match="owner/name is not on this disk and HF_HUB_OFFLINE is set"):
        load_bundle("owner/name")


def test_hub_model_that_is_on_this_disk_loads_offline_with_its_commit(family_checkpoint: CheckpointOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "a" * 40
    repository = tmp_path / "models--owner--name"
    shutil.copytree(family_checkpoint("gpt2"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    bundle = load_bundle("owner/name", allow_local=False)
    assert bundle.info.source == "hub" and bundle.info.revision == commit and bundle.info.model_id == "owner/name"
    assert bundle.model.config.model_type == "gpt2"


# Folders that hold no usable checkpoint.


def test_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnsafeCheckpoint, match="holds no .safetensors file"):
        load_bundle(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_only_folder_is_refused_and_convert_is_named(name: str, spoiled: Callable[..., Path]) -> None:
    folder = spoiled()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"never read")
    with pytest.raises(UnsafeCheckpoint, match="only pickle weights.*cli.py convert"):
        load_bundle(str(folder))


def test_pickle_beside_safetensors_is_not_read(spoiled: Callable[..., Path], family_checkpoint: CheckpointOf) -> None:
    folder = spoiled()
    (folder / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    assert torch.equal(contract.logits_of(load_bundle(str(folder))), contract.logits_of(load_bundle(str(family_checkpoint("llama")))))


@pytest.mark.parametrize("keep", [0, 4, 2000, -1], ids=["nothing", "four bytes", "header cut", "last byte lost"])
def test_truncated_safetensors_is_refused(keep: int, spoiled: Callable[..., Path]) -> None:
    folder = spoiled()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(UnsafeCheckpoint, match="model.safetensors is cut or broken"):
        load_bundle(str(folder))


def test_safetensors_of_noise_is_refused(spoiled: Callable[..., Path]) -> None:
    folder = spoiled()
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)
    with pytest.raises(UnsafeCheckpoint, match="cut or broken"):
        load_bundle(str(folder))


@pytest.mark.parametrize(("family", "name"), [
    ("llama", "model.norm.weight"), ("llama", "model.embed_tokens.weight"), ("qwen2", "lm_head.weight"),
    ("qwen2", "model.layers.1.self_attn.k_proj.bias"), ("gpt2", "transformer.h.0.attn.c_attn.weight"),
    ("opt", "model.decoder.embed_positions.weight"), ("opt_post_norm", "model.decoder.project_in.weight"),
    ("gpt_neox", "gpt_neox.layers.0.attention.dense.bias"), ("phi", "lm_head.bias"),
])
def test_missing_weight_is_refused_by_name(family: str, name: str, spoiled: Callable[..., Path]) -> None:
    folder = change_weights(spoiled(family), lambda state: state.pop(name))
    with pytest.raises(UnsafeCheckpoint, match=f"lacks 1 weights.*{name.replace('.', chr(92) + '.')}"):
        load_bundle(str(folder))


def test_missing_shard_is_refused(spoiled: Callable[..., Path]) -> None:
    folder = spoiled()
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    where = {name: f"model-0000{1 + ('norm' in name)}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with pytest.raises(ModelLoadError, match="model-00002-of-00002"):
        load_bundle(str(folder))


@pytest.mark.parametrize("changes", [
    {"model_type": "no_such_type"}, {"model_type": None}, {"hidden_size": 128}, {"vocab_size": 310}, {"hidden_act": "nope"},
    {"model_type": "custom", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}},
    pytest.param({"hidden_size": "abc"}),
    pytest.param({"hidden_size": -3}),
    pytest.param({"num_attention_heads": 0}),
], ids=str)
def test_configuration_that_does_not_fit_is_refused_in_words(changes: dict[str, Any], spoiled: Callable[..., Path]) -> None:
    with pytest.raises(ModelLoadError):
        load_bundle(str(change_config(spoiled(), **changes)))


@pytest.mark.parametrize("text", ["not json", "[1]", ""])
def test_configuration_that_is_no_json_object_is_refused(text: str, spoiled: Callable[..., Path]) -> None:
    folder = spoiled()
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelLoadError):
        load_bundle(str(folder))


def test_more_layers_than_the_file_has_are_refused(spoiled: Callable[..., Path]) -> None:
    with pytest.raises(UnsafeCheckpoint, match=r"lacks 9 weights.*model.layers.2"):
        load_bundle(str(change_config(spoiled(), num_hidden_layers=3)))


@pytest.mark.parametrize("text", ["{", '{"version": "1.0"}', ""])
def test_broken_tokenizer_is_refused_in_words(text: str, spoiled: Callable[..., Path]) -> None:
    folder = spoiled()
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelLoadError):
        load_bundle(str(folder))


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2")])
def test_folder_without_a_tokenizer_is_refused(family: str, spoiled: Callable[..., Path]) -> None:
    folder = spoiled(family)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelLoadError):
        load_bundle(str(folder))


def test_code_in_a_model_folder_is_never_run(spoiled: Callable[..., Path], tmp_path: Path) -> None:
    folder, ran = spoiled(), tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    change_config(folder, model_type="custom", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    with pytest.raises(ModelLoadError, match="custom code"):
        load_bundle(str(folder))
    assert not ran.exists()


# Sizes.


def test_checkpoint_elements_counts_every_weight_of_every_shard(family_checkpoint: CheckpointOf, tmp_path: Path) -> None:
    state = load_file(family_checkpoint("qwen2") / "model.safetensors")
    names = sorted(state)
    save_file({n: state[n] for n in names[:5]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: state[n] for n in names[5:]}, tmp_path / "model-00002-of-00002.safetensors")
    assert checkpoint_elements(tmp_path) == sum(t.numel() for t in state.values())


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_model_that_does_not_fit_is_refused_with_the_numbers(dtype: str, size: int, family_checkpoint: CheckpointOf, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = family_checkpoint("llama")
    need = int(checkpoint_elements(folder) * size * 1.15)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    monkeypatch.setattr(loading, "available_bytes", lambda: need - 1)
    with pytest.raises(OutOfMemory, match=f"needs about {format_bytes(need)} as {dtype}; {format_bytes(need - 1)} are free"):
        load_bundle(str(folder), dtype=dtype)


def test_model_that_just_fits_is_loaded(family_checkpoint: CheckpointOf, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = family_checkpoint("llama")
    monkeypatch.setattr(loading, "available_bytes", lambda: int(checkpoint_elements(folder) * 4 * 1.15))
    assert load_bundle(str(folder)).model is not None
