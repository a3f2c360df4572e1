"""Compiling at first use: cached, rebuilt when broken, and a reason in words where it cannot be done."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import build
from kernels.channels import above, largest, nonzero
from kernels.gemv import gemv, gemv_reference
from kernels.packing import TILE, pack


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSEBOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_loaded", {})
    return tmp_path


def kept() -> list[Path]:
    return list((Path(os.environ["FUSEBOX_CACHE"]) / "kernels").glob("*.so"))


def needs_compiler() -> None:
    if build.find_compiler() is None:
        pytest.skip("NOT RUN: no C compiler")


def test_second_use_takes_the_kept_library(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    assert build.native().library is not None and len(kept()) == 1
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_compiled", lambda *a: pytest.fail("compiled twice"))
    assert build.native().library is not None


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + b"\0" * 9000])
def test_broken_kept_library_is_compiled_anew(content: bytes) -> None:
    needs_compiler()
    compiler = build.find_compiler()
    assert compiler is not None
    path = Path(os.environ["FUSEBOX_CACHE"]) / "kernels" / f"fusebox-{build.library_key(compiler)}.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    library = build.native().library
    assert library is not None and library.fusebox_tile() == TILE


def test_read_only_cache_folder_is_no_obstacle(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    (apart / "file").write_text("a file where a folder should be")
    monkeypatch.setenv("FUSEBOX_CACHE", str(apart / "file"))
    assert build.native().library is not None


def test_without_a_compiler_torch_computes_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    found = build.native()
    assert found.library is None and "compiler" in found.reason
    x, packed = torch.randn(40), pack(torch.randn(30, 40), "int4", 32)
    rows = torch.tensor([3, 7, 39], dtype=torch.int32)
    assert torch.equal(gemv(x, packed, rows=rows), gemv_reference(x, packed, rows=rows))
    assert largest(x, 5).numel() == 5 and torch.equal(above(x, 0.5), (x.abs() > 0.5).nonzero()[:, 0].int()) and nonzero(x).numel() == 40
    out = torch.empty(30)
    assert gemv(x, packed, out=out) is out


def test_compiler_that_fails_is_quoted(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = apart / "cc"
    fake.write_text("#!/bin/sh\necho 'sorry, no vectors today' >&2\nexit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(fake))
    found = build.native()
    assert found.library is None and "sorry, no vectors today" in found.reason
    assert not kept()


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEBOX_NATIVE", "0")
    assert build.native() == build.Native(None, "switched off by FUSEBOX_NATIVE=0")


@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
def test_older_cpus_compute_the_same(march: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    if os.uname().machine != "x86_64":
        pytest.skip("NOT RUN: not an x86-64 machine")
    x, weight = torch.randn(100), torch.randn(200, 100)
    results = {}
    for name in ("native", march):
        monkeypatch.setenv("FUSEBOX_MARCH", name)
        assert build.native().library is not None
        results[name] = [gemv(x, pack(weight, kind)) for kind in ("float32", "bfloat16", "int8", "int4")]
    assert len(kept()) == 2
    for ours, theirs in zip(results["native"], results[march], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_sources_have_no_findings_under_address_and_undefined_sanitizers(apart: Path) -> None:
    """A C driver over odd sizes; in a process of its own, since the sanitizers must be loaded first."""
    needs_compiler()
    compiler = build.find_compiler()
    assert compiler is not None
    binary = apart / "driver"
    sources = [str(p) for p in sorted(build.SOURCE.glob("*.c"))]
    driver = str(Path(__file__).parent / "driver.c")
    flags = ["-O1", "-g", "-march=native", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-std=gnu11", "-Wno-psabi"]
    made = subprocess.run([compiler, *flags, "-o", str(binary), driver, *sources, "-lm", f"-I{build.SOURCE}"], capture_output=True, text=True, check=False)
    if made.returncode and "asan" in made.stderr + made.stdout:
        pytest.skip(f"NOT RUN: the compiler has no sanitizers: {made.stderr[:200]}")
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([str(binary)], capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
    assert ran.returncode == 0 and "all checked" in ran.stdout, ran.stdout + ran.stderr


def test_torch_and_ours_share_one_openmp_runtime() -> None:
    needs_compiler()
    code = (
        "import re, torch; from kernels.build import native; assert native().library is not None; "
        "found = {re.split(r'\\s+', l.strip())[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'iomp' in l}; print(len(found), found)"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("NOT RUN: no /proc")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=build.SOURCE.parent.parent)
    assert ran.stdout.startswith("1 "), ran.stdout + ran.stderr


def test_symbols_are_ours_alone() -> None:
    needs_compiler()
    library = build.native().library
    assert isinstance(library, ctypes.CDLL)
    for name in ("gemv", "gemv_blocks", "gemm", "gemm_way", "largest", "above", "nonzero", "tile", "norm", "rope", "activate", "append", "attend", "attention", "step"):
        assert getattr(library, f"fusebox_{name}")
