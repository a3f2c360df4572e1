"""What techniques prepared, kept between runs: one safetensors file by technique, settings, weights and text."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core import calibration
from core.bundle import Bundle
from core.digest import tensor_digest
from core.errors import CalibrationError
from core.files import cache_folder
from core.progress import Progress, silent
from core.technique import Prepared, Technique

log = logging.getLogger(__name__)

def bundle_digest(bundle: Bundle) -> str:
    """A digest of all that a preparation can depend on in a bundle: weights, configuration, tokenizer."""
    tokenizer: Any = bundle.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest = hashlib.sha256(json.dumps([bundle.model.config.to_dict(), tokenizer.special_tokens_map, vocabulary], sort_keys=True, default=str).encode())
    for name, tensor in bundle.model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor_digest(tensor)}".encode())
    return digest.hexdigest()


def code_digest(technique: Technique) -> str:
    """A digest of the technique's package and of the calibration text's reader: other code, other preparation."""
    source = inspect.getsourcefile(type(technique))
    files = sorted(Path(source).parent.glob("*.py")) if source else []
    return hashlib.sha256(b"".join(path.read_bytes() for path in (*files, Path(calibration.__file__)))).hexdigest()


def cache_path(technique: Technique, bundle: Bundle, data: Sequence[str] | None) -> Path:
    """Where the preparation of a technique for a bundle and calibration texts is kept."""
    texts = calibration.project_texts() if data is None else list(data)
    key = {
        "code": code_digest(technique), "settings": technique.prepare_settings(), "bundle": bundle_digest(bundle),
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    }
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
