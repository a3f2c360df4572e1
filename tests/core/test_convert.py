"""Pickle checkpoints: converted ones load with the same logits; what holds more than tensors is refused and does not run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.convert import convert_checkpoint
from core.errors import FuseboxError, InvalidRequest, UnsafeCheckpoint
from core.loading import load_bundle
from tests import contract, families
from tests.tolerances import SUM_ORDER

MakeBin = Callable[..., tuple[Path, PreTrainedModel]]


@pytest.fixture
def pickled(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> MakeBin:
    """`pickled("gpt2")`: a folder with pytorch_model.bin, configuration and tokenizer, and the model it was made of."""

    def make(family: str, state: dict[str, torch.Tensor] | None = None, **save: Any) -> tuple[Path, PreTrainedModel]:
        model = families.make_model(family, tokenizer)
        folder = tmp_path / f"{family}-bin"
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        torch.save(model.state_dict() if state is None else state, folder / "pytorch_model.bin", **save)
        return folder, model

    return make


def assert_same(folder: Path, model: PreTrainedModel) -> None:
    """The folder loads as `model`: every weight bit for bit, logits up to the order of sums (files are mapped at other alignments)."""
    bundle = load_bundle(str(folder))
    loaded, wanted = bundle.model.state_dict(), model.state_dict()
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
    ids = torch.tensor([bundle.tokenizer(contract.PROMPT)["input_ids"]])
    with torch.inference_mode():
        assert SUM_ORDER.holds(bundle.model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt_post_norm", "qwen2", "gpt_neox"])
def test_converted_checkpoint_loads_with_the_same_logits(family: str, pickled: MakeBin, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source, model = pickled(family)
    written = convert_checkpoint(source, tmp_path / "out")
    assert [path.name for path in written] == ["model.safetensors"]
    assert_same(tmp_path / "out", model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_tied_weights_are_stored_once_and_tied_on_loading(family: str, pickled: MakeBin, tmp_path: Path) -> None:
    source, _ = pickled(family)
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    convert_checkpoint(source, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert len(state) - len(stored) == 1
    model = load_bundle(str(tmp_path / "out")).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_checkpoint_of_the_base_model_alone_converts(pickled: MakeBin, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    base = families.make_model("gpt2", tokenizer).transformer.state_dict()  # no head, names without `transformer.`
    source, model = pickled("gpt2", state=base)
    convert_checkpoint(source, tmp_path / "out")
    assert_same(tmp_path / "out", model)


def test_bf16_stays_bf16_and_every_bit_stays(pickled: MakeBin, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    state = families.make_model("qwen2", tokenizer).to(torch.bfloat16).state_dict()
    source, _ = pickled("qwen2", state=state)
    convert_checkpoint(source, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == state.keys()
    assert all(stored[n].dtype == torch.bfloat16 and torch.equal(stored[n], t) for n, t in state.items())


def test_several_bin_files_become_one_state(pickled: MakeBin, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source, model = pickled("qwen2")
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    names = list(state)
    (source / "pytorch_model.bin").unlink()
    torch.save({n: state[n] for n in names[:4]}, source / "pytorch_model-00001-of-00002.bin")
    torch.save({n: state[n] for n in names[4:]}, source / "pytorch_model-00002-of-00002.bin")
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {}}))
    convert_checkpoint(source, tmp_path / "out")
    assert_same(tmp_path / "out", model)
    assert not (tmp_path / "out" / "pytorch_model.bin.index.json").exists()


def test_large_checkpoints_are_cut_into_shards_that_load(pickled: MakeBin, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source, model = pickled("qwen2")
    written = convert_checkpoint(source, tmp_path / "out", max_shard_size="100KB")
    assert len(written) > 2 and all(path.stat().st_size < 130_000 for path in written)
    assert_same(tmp_path / "out", model)


def test_configuration_and_tokenizer_come_along_and_nothing_else(pickled: MakeBin, tmp_path: Path) -> None:
    source, _ = pickled("gpt2")
    (source / "code.py").write_text("raise SystemExit")
    (source / "training_args.bin").write_bytes(b"never read")
    (source / "notes.md").write_text("x")
    convert_checkpoint(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= names
    assert not names & {"code.py", "training_args.bin", "notes.md", "pytorch_model.bin"}


def test_safetensors_metadata_says_pytorch(pickled: MakeBin, tmp_path: Path) -> None:
    source, _ = pickled("llama")
    (path,) = convert_checkpoint(source, tmp_path / "out")
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("how", ["torch", "torch legacy", "plain pickle"])
def test_pickle_with_code_is_refused_and_does_not_run(how: str, tmp_path: Path) -> None:
    ran, source = tmp_path / "ran", tmp_path / "source"
    source.mkdir()
    state = {"a": torch.ones(2), "b": Payload(ran)}
    if how == "plain pickle":
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(state))
    else:
        torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(UnsafeCheckpoint, match="pytorch_model.bin holds more than tensors, or is broken; it was not read"):
        convert_checkpoint(source, tmp_path / "out")
    assert not ran.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint" * 9, b"PK\x03\x04" + b"\0" * 60], ids=["empty", "text", "cut zip"])
def test_broken_bin_is_refused(content: bytes, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UnsafeCheckpoint, match="broken"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_checkpoint_in_the_old_torch_format_converts(pickled: MakeBin, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source, model = pickled("gpt2", _use_new_zipfile_serialization=False)
    convert_checkpoint(source, tmp_path / "out")
    assert_same(tmp_path / "out", model)


@pytest.mark.parametrize("content", [
    {"state_dict": {"a": torch.ones(2)}}, {"a": torch.ones(2), "epoch": 3}, [torch.ones(2)], torch.ones(2), {1: torch.ones(2)}, {},
], ids=["nested", "number", "list", "tensor", "number as name", "empty"])
def test_file_that_is_no_table_of_tensors_is_refused_in_words(content: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(FuseboxError):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")], ids=["missing", "empty", "a file"])
def test_source_without_bin_files_is_an_invalid_request(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "source")
    with pytest.raises(InvalidRequest, match="not a folder with pytorch_model"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out")


def test_only_training_arguments_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"never read")
    with pytest.raises(InvalidRequest):
        convert_checkpoint(tmp_path, tmp_path / "out")


def test_output_that_holds_files_is_refused_and_left_alone(pickled: MakeBin, tmp_path: Path) -> None:
    source, _ = pickled("gpt2")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="not empty"):
        convert_checkpoint(source, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_empty_output_folder_is_used(pickled: MakeBin, tmp_path: Path) -> None:
    source, _ = pickled("gpt2")
    (tmp_path / "out").mkdir()
    assert len(convert_checkpoint(source, tmp_path / "out")) == 1
