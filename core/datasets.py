"""Text and token sources: files in, plain Python lists or token arrays out. Nothing here downloads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import CalibrationError, InvalidRequest


@dataclass(frozen=True)
class Document:
    """One text of a corpus and where it came from."""

    text: str
    source: str
    shard: str


def _text_of(path: Path) -> str:
    """The text of a plain or zstd-compressed file."""
    if path.suffix != ".zst":
        return path.read_text(encoding="utf-8")
    import zstandard

    packed, data = path.read_bytes(), b""
    while packed:  # frames may follow one another
        unpacker = zstandard.ZstdDecompressor().decompressobj()
        try:
            data += unpacker.decompress(packed)
        except zstandard.ZstdError as error:
            raise CalibrationError(f"{path.name} is not zstd, or broken: {error}.") from error
        if not unpacker.eof:
            raise CalibrationError(f"{path.name} is cut off. Copy it again.")
        packed = unpacker.unused_data
    return data.decode("utf-8")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a `.jsonl` or `.jsonl.zst` file.

    Raises:
        CalibrationError: the file is cut, broken or not UTF-8.
        InvalidRequest: a line is no JSON object; names the line.
    """
    try:
        lines = _text_of(path).split("\n")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path.name} is not UTF-8 text.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InvalidRequest(f"{path.name}, line {number} is not JSON: {error.msg}.") from error
            if not isinstance(row, dict):
                raise InvalidRequest(f"{path.name}, line {number} is no JSON object.")
            yield row


def read_corpus(folder: Path) -> list[Document]:
    """Every document of the `*.jsonl` and `*.jsonl.zst` shards of a folder, in file order.

    Raises:
        CalibrationError: the folder holds no shard, or a row has no text.
    """
    shards = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.zst")])
    if not shards:
        raise CalibrationError(f"{folder} holds no .jsonl or .jsonl.zst file. Point --corpus at a folder of such shards.")
    documents = []
    for shard in shards:
        for row in read_jsonl(shard):
            if not isinstance(row.get("text"), str):
                raise CalibrationError(f"{shard.name} has a row without a text field.")
            documents.append(Document(row["text"], str(row.get("source", shard.name)), shard.name.split(".")[0]))
    return documents


def is_held_out(source: str, percent: float = 1.0) -> bool:
    """True for a fixed pseudo-random share of sources; the same on every machine and in every run."""
    digest = hashlib.sha256(source.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < percent / 100


@dataclass(frozen=True)
class TokenStream:
    """A long row of token ids, read as shuffled windows."""

    tokens: NDArray[np.uint16]  # [N]

    def window(self, index: int, length: int, seed: int = 0) -> Tensor:
        """The `index`-th window of a shuffled pass, [length] int64; passes follow one another, each in its own order."""
        count = len(self.tokens) // length
        if count == 0:
            raise CalibrationError(f"The text has {len(self.tokens)} tokens; a window needs {length}. Give more text.")
        epoch, place = divmod(index, count)
        order = np.random.default_rng((seed, epoch, length)).permutation(count)
        start = int(order[place]) * length
        return torch.from_numpy(self.tokens[start : start + length].astype(np.int64))

    def batch(self, step: int, rows: int, length: int, seed: int = 0) -> Tensor:
        """The windows of one training step, [rows, length] int64."""
        return torch.stack([self.window(step * rows + row, length, seed) for row in range(rows)])
