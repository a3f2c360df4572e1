"""Load a bundle: embedded, from a local folder, or from the hub. Safetensors only, no remote code, sizes checked first."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from core.bundle import Bundle, ModelInfo
from core.errors import InvalidRequest, ModelLoadError, ModelNotFound, OutOfMemory, UnsafeCheckpoint
from core.hub import fetch
from core.memory import available_bytes
from core.progress import Progress, silent
from core.units import format_bytes

log = logging.getLogger(__name__)

EMBEDDED_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "models"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OTHER_TASKS = ("ForSequenceClassification", "ForQuestionAnswering")
_HEADROOM = 1.15  # a load holds the weights and a few working buffers


def embedded_models() -> dict[str, Path]:
    """Names of the causal language models that ship with the app; `embedded` is the default one."""
    return {name: folder for name, folder in _embedded_folders().items() if not any(task in (folder / "config.json").read_text(encoding="utf-8") for task in _OTHER_TASKS)}


def _embedded_folders() -> dict[str, Path]:
    """Every model that ships with the app."""
    found = {p.parent.name: p.parent for p in sorted(EMBEDDED_FOLDER.glob("*/config.json"))}
    return {("embedded" if name == "chat" else f"embedded/{name}"): folder for name, folder in found.items()}


def locate(model_id: str, revision: str | None = None, progress: Progress = silent, allow_local: bool = True) -> tuple[Path, str | None, str]:
    """The folder, revision and kind of source (embedded, local, hub) of a model id; hub files are downloaded when they are not here.

    Raises:
        InvalidRequest, ModelNotFound, HubUnavailable, UnsafeCheckpoint, OutOfMemory.
    """
    if not isinstance(model_id, str) or not model_id.strip() or "\0" in model_id or len(model_id) > 300:
        raise InvalidRequest(f"The model is {str(model_id)[:80]!r}; use embedded, owner/name of the hub, or a local folder.")
    embedded = _embedded_folders()
    if model_id in embedded:
        return embedded[model_id], _content_hash(embedded[model_id]), "embedded"
    if model_id.split("/", maxsplit=1)[0] == "embedded":
        raise ModelNotFound(f"There is no embedded model {model_id!r}; there are: {', '.join(embedded) or 'none'}.")
    folder = _local_folder(model_id) if allow_local else None
    if folder is not None:
        return folder, _content_hash(folder), "local"
    if model_id.startswith(("/", ".", "~")) or "\\" in model_id or model_id.count("/") != 1:
        why = "there is no such folder" if allow_local else "local folders are closed here"
        raise ModelNotFound(f"{model_id!r}: {why}, and it is not a hub id (owner/name).")
    snapshot = fetch(model_id, revision, int(available_bytes() / _HEADROOM), progress)
    return snapshot.folder, snapshot.revision, "hub"


def _local_folder(model_id: str) -> Path | None:
    """The folder a model id names, None when it names none."""
    try:
        folder = Path(model_id).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError):  # too long a name, or ~ of an unknown user
        return None


def _content_hash(folder: Path) -> str:
    """A short name for the weights in a folder: changes when a file's name, size or header changes."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{path.stat().st_size}".encode() + file.read(1 << 16))
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def checkpoint_elements(folder: Path) -> int:
    """Number of weights in a folder's safetensors files, from their headers.

    Raises:
        UnsafeCheckpoint: no safetensors file, or one that is cut or broken.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        if any([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
            raise UnsafeCheckpoint(f"{folder.name} has only pickle weights, which can run code. Run `python cli.py convert {folder.name} OUTPUT` first.")
        raise UnsafeCheckpoint(f"{folder.name} holds no .safetensors file, so it is no model folder.")
    count = 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    shape = tensors.get_slice(name).get_shape()
                    count += int(torch.Size(shape).numel())
        except (SafetensorError, OSError) as error:
            raise UnsafeCheckpoint(f"{path.name} is cut or broken ({error}). Download it again.") from error
    return count


def refuse_if_too_large(folder: Path, dtype: torch.dtype) -> None:
    """Raises OutOfMemory, with the numbers, when the weights in `dtype` do not fit into what is free."""
    need = int(checkpoint_elements(folder) * dtype.itemsize * _HEADROOM)
    free = available_bytes()
    if need > free:
        raise OutOfMemory(f"{folder.name} needs about {format_bytes(need)} as {str(dtype)[6:]}; {format_bytes(free)} are free. Unload a model or choose a smaller one.")


def _check_weights(model: nn.Module, name: str, missing: set[str]) -> None:
    """Missing tied weights are tied again by transformers; anything else that was not in the file is an error."""
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    lost = sorted(missing - tied)
    on_meta = [n for n, p in [*model.named_parameters(), *model.named_buffers()] if p.device.type == "meta"]
    if lost or on_meta:
        bad = (lost or on_meta)[:3]
        raise UnsafeCheckpoint(f"{name} lacks {len(lost or on_meta)} weights its architecture needs, {', '.join(bad)} among them. It is not a complete causal language model.")


def load_bundle(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    allow_local: bool = True,
    progress: Progress = silent,
) -> Bundle:
    """Load model and tokenizer.

    Args:
        model_id: `embedded`, `embedded/<name>`, a local folder, or `owner/name` of the hub.
        revision: hub commit, branch or tag.
        dtype: float32, bfloat16 or float16.
        allow_local: False closes local folders (a public Space).

    Raises:
        ModelNotFound, HubUnavailable, UnsafeCheckpoint, OutOfMemory, ModelLoadError, InvalidRequest.
    """
    if dtype not in DTYPES:
        raise InvalidRequest(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}.")
    folder, commit, source = locate(model_id, revision, progress, allow_local)
    progress(0.1, f"reading {model_id}")
    refuse_if_too_large(folder, DTYPES[dtype])
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False,
            local_files_only=True, output_loading_info=True,
        )
        model, info = loaded
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, json.JSONDecodeError, SafetensorError, ImportError, ArithmeticError, StrictDataclassError) as error:
        raise ModelLoadError(f"{model_id} cannot be loaded as a causal language model: {_first_line(error)}") from error
    if not tokenizer("a b c", add_special_tokens=False)["input_ids"]:
        raise ModelLoadError(f"{model_id} has no usable tokenizer files; it turns text into no tokens at all.")
    _check_weights(model, model_id, set(info["missing_keys"]))
    model.generation_config = _plain_generation(model)
    model.eval().requires_grad_(False).to(device)
    progress(1.0, f"{model_id} is loaded")
    return Bundle(model, tokenizer, ModelInfo(model_id, commit, dtype, source))


def _plain_generation(model: Any) -> GenerationConfig:
    """Keep only the token ids of a checkpoint's generation settings: sampling comes from the request."""
    given = model.generation_config
    return GenerationConfig(bos_token_id=given.bos_token_id, eos_token_id=given.eos_token_id, pad_token_id=given.pad_token_id)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
