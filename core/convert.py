"""Pickle checkpoints to safetensors, on this machine, without running what they may contain."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from core.errors import InvalidRequest, UnsafeCheckpoint


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one pickle file by name; nothing in it is run.

    Raises:
        UnsafeCheckpoint: it holds anything but a flat table of tensors.
    """
    try:
        with file.open("rb") as head:
            zipped = head.read(2) == b"PK"  # files of torch before 1.6 cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UnsafeCheckpoint(f"{file.name} holds more than tensors, or is broken; it was not read.") from error
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
        raise UnsafeCheckpoint(f"{file.name} is no flat table of named tensors. Save the model's state_dict() alone.")
    return content


def convert_checkpoint(source: Path, output: Path, max_shard_size: str = "2GB") -> list[Path]:
    """Write a folder of `pytorch_model*.bin` files as safetensors shards, configuration and tokenizer beside them.

    Args:
        source: a model folder.
        output: a folder that does not exist or is empty.

    Returns:
        The safetensors files written.

    Raises:
        InvalidRequest: no .bin file, or `output` holds files.
        UnsafeCheckpoint: a file holds more than tensors (`weights_only` loading refuses it).
    """
    files = sorted(source.glob("*.bin")) if source.is_dir() else []
    files = [f for f in files if f.name.startswith(("pytorch_model", "model"))]
    if not files:
        raise InvalidRequest(f"{source} is not a folder with pytorch_model*.bin files.")
    if output.exists() and any(output.iterdir()):
        raise InvalidRequest(f"{output} is not empty. Name a new folder.")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state.update(_read_tensors(file))
    if not state:
        raise UnsafeCheckpoint(f"{source.name} holds no tensors.")
    output.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state, output, max_shard_size=max_shard_size)
    for path in source.iterdir():
        if path.suffix in (".json", ".model", ".txt", ".jinja") and not path.name.endswith(".bin.index.json"):
            shutil.copy2(path, output / path.name)
    return sorted(output.glob("*.safetensors"))
