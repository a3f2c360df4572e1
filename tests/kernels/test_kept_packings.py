"""Packed weights kept on disk: the same weight again, broken files, folders that cannot be written, the limit, several processes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.files import keep_within, replacing
from kernels import kept_packings
from kernels.kept_packings import LIMIT_VARIABLE, KeptPackings, packing_key
from kernels.packing import PackedWeight, pack, packed_layout


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSEBOX_CACHE", str(tmp_path))
    return tmp_path / "packed"


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(200, 300)


def packed_again(weight: Tensor, group_size: int = 64) -> tuple[PackedWeight, int, int]:
    """What a new process would get, and how many weights it found and made."""
    with KeptPackings() as kept:
        packed = kept.pack(weight, "int4", group_size)
    return packed, kept.found, kept.made


def assert_equal(a: PackedWeight, b: PackedWeight) -> None:
    assert (a.kind, a.out_features, a.in_features, a.group_size, a.by_row) == (b.kind, b.out_features, b.in_features, b.group_size, b.by_row)
    assert a.data.dtype == b.data.dtype and torch.equal(a.data, b.data)
    assert a.scale is not None and b.scale is not None and a.scale.dtype == b.scale.dtype and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("shape", [(200, 300), (128, 2560), (3000, 3000)], ids=str)
@pytest.mark.parametrize("group_size", [32, 64])
def test_the_second_time_is_read_and_equals_the_first(shape: tuple[int, int], group_size: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(shape).bfloat16()
    first, found, made = packed_again(weight, group_size)
    assert (found, made) == (0, 1) and len(list(folder.iterdir())) == 1
    monkeypatch.setattr(kept_packings, "pack", lambda *a: pytest.fail("packed although it was kept"))
    second, found, made = packed_again(weight, group_size)
    assert (found, made) == (1, 0)
    assert_equal(first, second)
    assert_equal(second, pack(weight, "int4", group_size))
    assert str(folder) not in Path("/proc/self/maps").read_text(), "the file is not mapped once it is read"


def test_what_a_packing_depends_on_is_in_its_key(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    other = weight.clone()
    other[-1, -1] += 1
    keys = [packing_key(w, "int4", g) for w, g in ((weight, 64), (weight, 32), (other, 64), (weight.bfloat16(), 64), (weight.reshape(300, 200), 64), (weight.reshape(300, 200).T, 64))]
    monkeypatch.setattr(kept_packings, "_code_digest", lambda: "other code")
    keys.append(packing_key(weight, "int4", 64))
    assert len(set(keys)) == len(keys)
    assert packing_key(other, "int4", 64) not in keys[:1]


def test_a_transposed_weight_is_found_again(weight: Tensor) -> None:
    first, *_ = packed_again(weight.T)
    second, found, _ = packed_again(weight.clone().T)
    assert found == 1
    assert_equal(first, second)
    assert_equal(first, pack(weight.T, "int4"))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_kinds_that_are_read_no_faster_than_packed_are_not_kept(kind: str, weight: Tensor, folder: Path) -> None:
    with KeptPackings() as kept:
        packed = kept.pack(weight, kind)
        kept.pack(weight[:10], "int4")
    assert torch.equal(packed.data, pack(weight, kind).data)
    assert not folder.exists() and kept.note() == ""


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def one_bit_turned(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(bytes(data))


def of_another_program(path: Path) -> None:
    save_file({"data": torch.zeros(3)}, path)


def with_other_shapes(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}
    save_file({**tensors, "scale": tensors["scale"][:1].contiguous()}, path, metadata=about)


def without_checksums(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        key, tensors = file.metadata()["key"], {name: file.get_tensor(name).clone() for name in file.keys()}
    save_file(tensors, path, metadata={"key": key})




@pytest.mark.parametrize("damage", [cut, cut_in_the_header, emptied, one_bit_turned, of_another_program, with_other_shapes, without_checksums])
def test_a_broken_or_foreign_file_is_made_again_and_logged(damage: object, weight: Tensor, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, *_ = packed_again(weight)
    (path,) = folder.iterdir()
    damage(path)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        second, found, made = packed_again(weight)
    assert (found, made) == (0, 1) and path.name in caplog.text
    assert_equal(first, second)
    assert packed_again(weight)[1] == 1, "the file is whole again"


def test_a_file_under_another_weights_name_is_not_taken_for_it(weight: Tensor, folder: Path) -> None:
    packed_again(weight)
    (path,) = folder.iterdir()
    stolen = path.read_bytes()
    path.unlink()
    packed_again(weight + 1)
    (other,) = folder.iterdir()
    other.write_bytes(stolen)
    packed, found, _ = packed_again(weight + 1)
    assert found == 0
    assert_equal(packed, pack(weight + 1, "int4"))


def test_a_place_that_cannot_be_written_costs_nothing_but_time(weight: Tensor, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("a file stands where the folder should be")
    with caplog.at_level(logging.WARNING), KeptPackings() as kept:
        packed = kept.pack(weight, "int4")
        kept.pack(weight + 1, "int4")
    assert_equal(packed, pack(weight, "int4"))
    assert caplog.text.count("not kept") == 1, "said once, not for each weight"


def test_a_disk_that_fills_up_while_a_file_is_written_leaves_no_half_of_it(weight: Tensor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_packings, "save_file", half)
    packed, *_ = packed_again(weight)
    assert_equal(packed, pack(weight, "int4"))
    assert not list(folder.iterdir())


def test_a_kept_weight_is_read_where_its_file_cannot_be_marked_as_used(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_again(weight)

    def refuse(*args: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "utime", refuse)
    assert packed_again(weight)[1] == 1


def test_the_least_recently_used_go_when_the_limit_is_reached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.randn(200, 300) + i for i in range(4)]
    for place, weight in enumerate(weights[:3]):
        packed_again(weight)
        for path in folder.iterdir():  # as if each were used an hour after the one before
            if path.stat().st_mtime > 10_000_000:
                os.utime(path, (3600 * (place + 1), 3600 * (place + 1)))
    size = next(folder.iterdir()).stat().st_size
    assert packed_again(weights[0])[1] == 1  # used again: the second is now the oldest
    monkeypatch.setenv(LIMIT_VARIABLE, str(3 * size + 10))
    packed_again(weights[3])
    assert len(list(folder.iterdir())) == 3
    assert [packed_again(weight)[1] for weight in (weights[0], weights[2], weights[3], weights[1])] == [1, 1, 1, 0]


def test_a_limit_of_zero_keeps_nothing_and_an_unreadable_one_is_named(weight: Tensor, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    assert packed_again(weight)[1:] == (0, 0) and not folder.exists()
    monkeypatch.setenv(LIMIT_VARIABLE, "8 GB")
    assert packed_again(weight)[1:] == (0, 1) and "8 GB" in caplog.text


def test_a_disk_that_is_nearly_full_keeps_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in range(4):
        (tmp_path / f"file{place}").write_bytes(bytes(100))
    monkeypatch.setattr("core.files.shutil.disk_usage", lambda folder: type("Usage", (), {"free": 450})())
    assert keep_within(tmp_path, 10_000) == 2, "a quarter of 400 + 450 bytes"
    assert keep_within(tmp_path, 0) == 2 and not list(tmp_path.iterdir())


def test_two_processes_at_once_give_whole_files(folder: Path, weight: Tensor) -> None:
    """Each writes every file many times while the other reads it."""
    program = (
        "import torch\nfrom kernels.kept_packings import KeptPackings\nfrom kernels.packing import pack\ntorch.set_num_threads(1)\ntorch.manual_seed(0)\n"
        "weights = [torch.randn(300, 500) for _ in range(2)]\nwanted = [pack(w, 'int4') for w in weights]\n"
        "for turn in range(12):\n    kept = KeptPackings()\n"
        "    for w, p in zip(weights, wanted):\n        got = kept.pack(w, 'int4')\n        assert torch.equal(got.data, p.data) and torch.equal(got.scale, p.scale)\n"
        "    for path in kept.folder.iterdir():\n        (path.unlink(missing_ok=True) if turn % 2 == 0 and not path.name.startswith('.') else None)\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0 and "made again" not in said, said
    assert len(list(folder.iterdir())) == 2, "no half-written file is left"


def test_a_file_that_is_being_replaced_stays_whole_and_leaves_nothing_on_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as fresh:
        fresh.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("shape", [(5, 3), (128, 64), (300, 130)], ids=str)
def test_the_layout_is_what_pack_makes(kind: str, shape: tuple[int, int]) -> None:
    packed = pack(torch.randn(shape), kind, 32)
    made = {"data": packed.data, "scale": packed.scale}
    assert packed_layout(*shape, kind, 32) == {name: (t.dtype, tuple(t.shape)) for name, t in made.items() if t is not None}
