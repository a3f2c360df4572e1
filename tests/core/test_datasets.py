"""Datasets: files to documents and windows, the same in every run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from core.datasets import Document, TokenStream, is_held_out, read_corpus, read_jsonl
from core.errors import CalibrationError, FuseboxError, InvalidRequest

ROWS = [{"text": "one\nline", "source": "a"}, {"text": "é 日本", "source": "b"}, {"text": "no source"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize("name", ["shard.jsonl", "shard.jsonl.zst"])
def test_jsonl_plain_or_compressed_gives_its_objects(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(zstandard.compress(LINES) if name.endswith("zst") else LINES)
    assert list(read_jsonl(tmp_path / name)) == ROWS


def test_blank_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_bytes(b"\n" + LINES.replace(b"\n", b"\n  \n") + b"\n")
    assert list(read_jsonl(tmp_path / "s.jsonl")) == ROWS


def test_several_zstd_frames_in_a_row_are_all_read(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl.zst").write_bytes(zstandard.compress(LINES) + zstandard.compress(LINES))
    assert list(read_jsonl(tmp_path / "s.jsonl.zst")) == ROWS * 2


def test_line_that_is_not_json_is_refused_by_number(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_bytes(LINES + b"\n{oops\n")
    rows = read_jsonl(tmp_path / "s.jsonl")
    assert [next(rows) for _ in ROWS] == ROWS
    with pytest.raises(InvalidRequest, match=r"s\.jsonl, line 5 is not JSON"):
        next(rows)


def test_truncated_zstd_is_refused(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    first = compressor.compress(LINES) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    rest = compressor.compress(LINES) + compressor.flush()
    (tmp_path / "s.jsonl.zst").write_bytes(first + rest)
    assert len(list(read_jsonl(tmp_path / "s.jsonl.zst"))) == 2 * len(ROWS)
    (tmp_path / "s.jsonl.zst").write_bytes(first)
    with pytest.raises(FuseboxError):
        list(read_jsonl(tmp_path / "s.jsonl.zst"))


def test_zstd_cut_inside_a_line_is_refused(tmp_path: Path) -> None:
    data = zstandard.compress(b"".join(json.dumps({"text": str(i) * 50}).encode() + b"\n" for i in range(5000)))
    (tmp_path / "s.jsonl.zst").write_bytes(data[: len(data) // 2])
    with pytest.raises(FuseboxError):
        list(read_jsonl(tmp_path / "s.jsonl.zst"))


@pytest.mark.parametrize(("name", "data"), [("s.jsonl.zst", b"not compressed"), ("s.jsonl", b'{"text": "\xff"}\n')])
def test_bytes_that_are_no_text_are_refused_in_words(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FuseboxError):
        list(read_jsonl(tmp_path / name))


def test_corpus_is_all_shards_in_file_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINES))
    (tmp_path / "notes.txt").write_text("not a shard")
    documents = read_corpus(tmp_path)
    assert [d.text for d in documents] == [row["text"] for row in ROWS] * 2
    assert [d.shard for d in documents] == ["a"] * 3 + ["b"] * 3
    assert documents[0] == Document("one\nline", "a", "a") and documents[2].source == "a.jsonl.zst"


def test_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"holds no \.jsonl or \.jsonl\.zst file"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("line", ['{"source": "a"}', "[1]", "3", '{"text": 3}', '{"text": null}'])
def test_row_without_text_is_refused_in_words(line: str, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(line + "\n")
    with pytest.raises(FuseboxError):
        read_corpus(tmp_path)


def test_shared_corpus_shard_has_the_documents_its_readme_counts(shared: Callable[..., Path]) -> None:
    documents = list(read_jsonl(shared("data", "corpus", "climate.jsonl.zst")))
    assert len(documents) == 177
    assert sum(len(d["text"].encode()) for d in documents) == pytest.approx(1.32e6, rel=0.01)
    assert all(set(d) == {"text", "source", "licence"} for d in documents)


# The held-out share.


def test_held_out_share_is_about_one_percent_and_fixed() -> None:
    held = [s for s in map(str, range(20_000)) if is_held_out(s)]
    assert 160 <= len(held) <= 240  # 200 expected, three standard deviations are 42
    assert is_held_out("owner/repository:path/file.md#3") is is_held_out("owner/repository:path/file.md#3")
    assert held[:3] == ["178", "245", "286"]  # the same on every machine, for ever


@given(st.text(max_size=30), st.floats(0, 100), st.floats(0, 100))
def test_a_larger_share_holds_the_smaller(source: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert not is_held_out(source, low) or is_held_out(source, high)
    assert is_held_out(source, 100.0) and not is_held_out(source, 0.0)


# Windows.


@given(tokens=st.integers(1, 300), length=st.integers(1, 40), seed=st.integers(0, 3), epoch=st.integers(0, 2))
def test_a_pass_shows_every_window_once(tokens: int, length: int, seed: int, epoch: int) -> None:
    stream = TokenStream(np.arange(tokens, dtype=np.uint16))
    count = tokens // length
    if count == 0:
        with pytest.raises(CalibrationError, match=f"has {tokens} tokens; a window needs {length}"):
            stream.window(0, length)
        return
    windows = [stream.window(epoch * count + i, length, seed) for i in range(count)]
    assert all(w.dtype == torch.int64 and len(w) == length for w in windows)
    assert all(torch.equal(w, torch.arange(int(w[0]), int(w[0]) + length)) for w in windows)
    assert sorted(int(w[0]) for w in windows) == list(range(0, count * length, length))


def test_passes_and_seeds_have_their_own_order_and_repeat_exactly() -> None:
    stream = TokenStream(np.arange(1000, dtype=np.uint16))

    def order(epoch: int, seed: int) -> list[int]:
        return [int(stream.window(epoch * 100 + i, 10, seed)[0]) for i in range(100)]

    assert order(0, 0) == order(0, 0) != order(1, 0) != order(2, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != sorted(order(0, 0))


def test_batches_are_consecutive_windows_of_the_pass() -> None:
    stream = TokenStream(np.arange(1000, dtype=np.uint16))
    for step in (0, 3, 25):
        batch = stream.batch(step, 4, 10, seed=7)
        assert batch.shape == (4, 10)
        assert all(torch.equal(batch[row], stream.window(step * 4 + row, 10, 7)) for row in range(4))


def test_token_ids_up_to_65535_survive() -> None:
    stream = TokenStream(np.array([65535, 40000, 0], dtype=np.uint16))
    assert stream.window(0, 3).tolist() == [65535, 40000, 0]


def test_windows_are_copies() -> None:
    stream = TokenStream(np.arange(10, dtype=np.uint16))
    stream.window(0, 10).zero_()
    assert stream.tokens.tolist() == list(range(10))
