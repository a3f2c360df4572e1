"""What techniques prepared, kept between runs: one safetensors file by technique, settings, weights and text."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from core.bundle import Bundle
from core.errors import CalibrationError
from core.files import cache_folder
from core.progress import Progress, silent
from core.technique import Prepared, Technique

log = logging.getLogger(__name__)

VERSION = 1
"""Raised when a technique's preparation changes its meaning: older files are then made again."""


def weights_digest(bundle: Bundle) -> str:
    """A digest of every weight's name, shape and bits, and of the vocabulary's size."""
    digest = hashlib.sha256(f"{bundle.model.config.model_type} {len(bundle.tokenizer)}".encode())
    for name, tensor in bundle.model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_path(technique: Technique, bundle: Bundle, data: Sequence[str] | None) -> Path:
    """Where the preparation of a technique for a bundle and calibration texts is kept."""
    text = hashlib.sha256("\0".join(data).encode()).hexdigest() if data is not None else None
    key = {"version": VERSION, "settings": technique.prepare_settings(), "weights": weights_digest(bundle), "text": text}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / "prepared" / f"{technique.name}-{name}.safetensors"


def calibrates(technique: Technique) -> bool:
    """True for a technique that has something to prepare."""
    return type(technique).prepare is not Technique.prepare


def cached_prepare(technique: Technique, bundle: Bundle, data: Sequence[str] | None = None, progress: Progress = silent) -> Prepared:
    """`technique.prepare`, or what it found for the same weights, settings and text before.

    A file that is broken is made again; a folder that cannot be written costs only the next run's time.
    """
    if not calibrates(technique):
        return technique.prepare(bundle, data, progress)
    path = cache_path(technique, bundle, data)
    if path.is_file():
        try:
            return Prepared.load(path)
        except CalibrationError as error:
            log.warning("%s", error)
    prepared = technique.prepare(bundle, data, progress)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prepared.save(path)
    except OSError as error:
        log.warning("the preparation of %s is not kept: %s", technique.name, error)
    return prepared
