"""Packed weights kept on disk: to search an int4 weight's scales takes far longer than to read what came of it the last time."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import zlib
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.digest import tensor_digest
from core.files import cache_folder, keep_within, replacing
from kernels import packing
from kernels.huge_pages import in_huge_pages
from kernels.packing import PackedWeight, pack, packed_layout

log = logging.getLogger(__name__)

KEPT_KINDS = ("int4",)
"""Kinds whose scales are searched for. Measured on TinyLlama's shape, 2 threads: int4 17 s, or 2.1 s from the disk; int8 4.1 s, or 3.1 s from
the disk after a first start of 8.9 s and for 1 GB kept; bfloat16, only put in another order, 3.3 s, of which hashing and reading would take as much."""

LEAST_ELEMENTS = 2**15
"""Smaller weights are packed within a millisecond or two."""

LIMIT_BYTES = 8 * 2**30
LIMIT_VARIABLE = "FUSEBOX_PACKED_CACHE_BYTES"
"""Environment variable that sets another limit; 0 keeps nothing."""


class KeptPackings:
    """`pack`, or what it gave before for the same bytes, kind and groups. Leaving its `with` block brings the folder within its limit.

    A file that is cut, broken or of something else is made again; a folder that cannot be written costs only the next start's time.
    Several processes may use one folder.

    found, made: how many weights of KEPT_KINDS were read from the folder, and how many were packed.
    """

    def __init__(self) -> None:
        self.folder = cache_folder() / "packed"
        self.limit_bytes = _limit()
        self.found, self.made = 0, 0
        self._may_write, self._written = self.limit_bytes > 0, False

    def pack(self, weight: Tensor, kind: str, group_size: int = 64) -> PackedWeight:
        """As `kernels.packing.pack`."""
        if kind not in KEPT_KINDS or weight.numel() < LEAST_ELEMENTS or not self.limit_bytes:
            return pack(weight, kind, group_size)
        key = packing_key(weight, kind, group_size)
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        known = self._read(path, key, weight, kind, group_size)
        if known is not None:
            self.found += 1
            return known
        self.made += 1
        packed = pack(weight, kind, group_size)
        self._write(path, key, packed)
        return packed

    def note(self) -> str:
        """How many weights came from the disk, in words; empty where none was looked for."""
        total = self.found + self.made
        return f"{self.found} of {total} packed weights were read from the cache on disk" if total else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._written:
            return
        try:
            removed = keep_within(self.folder, self.limit_bytes)
        except OSError as problem:
            log.warning("the cache of packed weights is not brought within its limit: %s", problem)
        else:
            if removed:
                log.info("removed %d packed weights that were not used for longest", removed)

    def _read(self, path: Path, key: str, weight: Tensor, kind: str, group_size: int) -> PackedWeight | None:
        try:
            tensors = _checked(path, key, packed_layout(weight.shape[0], weight.shape[1], kind, group_size))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            log.warning("the packed weight %s is made again: %s", path.name, error)
            return None
        with suppress(OSError):  # a folder that is only read
            os.utime(path)  # used now: the last to be removed
        out, inside = weight.shape
        return PackedWeight(kind, out, inside, tensors["data"], tensors["scale"], group_size)

    def _write(self, path: Path, key: str, packed: PackedWeight) -> None:
        if not self._may_write:
            return
        assert packed.scale is not None
        tensors = {"data": packed.data, "scale": packed.scale}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as fresh:
                save_file(tensors, fresh, metadata={"key": key, **{name: _checksum(t) for name, t in tensors.items()}})
            self._written = True
        except (OSError, SafetensorError) as error:
            self._may_write = False
            log.warning("packed weights are not kept: %s", error)


def packing_key(weight: Tensor, kind: str, group_size: int) -> str:
    """All that a packed weight depends on: bytes, kind, groups, and the code that packs."""
    return json.dumps({"weight": tensor_digest(weight), "kind": kind, "group_size": group_size, "code": _code_digest()})


@functools.cache
def _code_digest() -> str:
    return hashlib.sha256(Path(packing.__file__).read_bytes()).hexdigest()


def _limit() -> int:
    text = os.environ.get(LIMIT_VARIABLE, "")
    if text and not text.isdigit():
        log.warning("%s is %r, which is no number of bytes; the limit stays at %d", LIMIT_VARIABLE, text[:40], LIMIT_BYTES)
    return int(text) if text.isdigit() else LIMIT_BYTES


def _checked(path: Path, key: str, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Tensors of a file in memory of their own.

    Mapped pages would be small ones, which cost decode a tenth to a quarter of the bandwidth, and would crash the process were the file cut.

    Raises:
        OSError, SafetensorError, ValueError: cut, broken, or of another weight.
    """
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        if about.get("key") != key or set(file.keys()) != set(layout):
            raise ValueError("it is of something else")
        mapped = {name: file.get_tensor(name) for name in layout}
    tensors = {}
    for name, (dtype, shape) in layout.items():
        if (mapped[name].dtype, tuple(mapped[name].shape)) != (dtype, shape):
            raise ValueError(f"{name} has another shape")
        moved = in_huge_pages(mapped[name])
        tensors[name] = moved.clone() if moved is mapped[name] else moved
        if _checksum(tensors[name]) != about.get(name):
            raise ValueError(f"the bytes of {name} are not those that were written")
    return tensors


def _checksum(tensor: Tensor) -> str:
    return str(zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data))
