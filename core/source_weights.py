"""A model's weights in its files, one by one: what was let go of in memory is read again from here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.bundle import ModelInfo
from core.errors import FuseboxError, ModelLoadError, UnsupportedModel
from core.loading import DTYPES, locate


class SourceWeights:
    """The safetensors files that a bundle was loaded from.

    Raises:
        UnsupportedModel: there are none, or they are no longer those that were loaded; `purpose` says what they were wanted for.
    """

    def __init__(self, info: ModelInfo, purpose: str) -> None:
        self._info = info
        try:
            folder, revision, _ = locate(info.model_id, info.revision if info.source == "hub" else None)
        except FuseboxError as error:
            raise UnsupportedModel(f"{purpose} needs the files of {info.model_id} to read its weights again: {error}") from error
        if revision != info.revision:
            raise UnsupportedModel(f"{purpose} needs the files that {info.model_id} was loaded from, and they have changed since. Load the model again.")
        self._files: dict[str, Path] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._stamps[path] = _stamp(path)
            with safe_open(path, framework="pt") as file:
                self._files.update(dict.fromkeys(file.keys(), path))

    def reader(self, name: str, parameter: Tensor) -> Callable[[], Tensor] | None:
        """A function that reads `parameter` again, or None when no file holds these very bits: techniques have made others of them."""
        for key in (name, name.partition(".")[2]):  # some checkpoints leave out the name of the base model
            if key in self._files:
                found = self._read(key)
                if found.shape == parameter.shape and found.dtype == parameter.dtype and torch.equal(_bits(found), _bits(parameter)):
                    return partial(self._read_again, key)
        return None

    def _read(self, key: str) -> Tensor:
        with safe_open(self._files[key], framework="pt") as file:
            return file.get_tensor(key).to(DTYPES[self._info.dtype])

    def _read_again(self, key: str) -> Tensor:
        """As `_read`, in memory of its own.

        Raises:
            ModelLoadError: the files are gone or have changed.
        """
        try:
            changed = _stamp(self._files[key]) != self._stamps[self._files[key]]
            if not changed:
                return self._read(key).clone()
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(f"The weights of {self._info.model_id} cannot be read again ({error}), so what replaced them stays.") from error
        raise ModelLoadError(f"The files of {self._info.model_id} have changed since its weights were released, so what replaced them stays. Load the model again.")


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)
