"""The C library: compiled by the machine's compiler at first use, kept by source, compiler and CPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch  # first: our library then takes torch's OpenMP runtime, one pool of threads for both

from core.files import cache_folder
from core.provenance import cpu_name

log = logging.getLogger(__name__)

SOURCE = Path(__file__).resolve().parent / "source"
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi")
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Native:
    """The loaded library, or the reason why there is none."""

    library: ctypes.CDLL | None
    reason: str = ""


_DEPENDS_ON = ("CC", "PATH", "FUSEBOX_MARCH", "FUSEBOX_CACHE")
_lock = threading.Lock()
_loaded: dict[tuple[str | None, ...], Native] = {}
"""By what the environment says: a prompt asks for the library at every layer, and looking for the compiler takes longer than a small product."""


def native() -> Native:
    """The C library, compiled if need be; never raises. `FUSEBOX_NATIVE=0` switches it off, `FUSEBOX_MARCH` names another CPU."""
    if os.environ.get("FUSEBOX_NATIVE") == "0":
        return Native(None, "switched off by FUSEBOX_NATIVE=0")
    asked = tuple(map(os.environ.get, _DEPENDS_ON))
    found = _loaded.get(asked)
    if found is not None:
        return found
    with _lock:
        if asked not in _loaded:
            _loaded[asked] = _found()
            if _loaded[asked].library is None:
                log.warning("no native kernels: %s", _loaded[asked].reason)
        return _loaded[asked]


def _found() -> Native:
    compiler = find_compiler()
    return Native(None, "there is no C compiler; install gcc or clang") if compiler is None else _load(compiler, library_key(compiler))


def find_compiler() -> str | None:
    """`CC`, else the first of cc, gcc and clang that is installed."""
    chosen = os.environ.get("CC")
    return shutil.which(chosen) if chosen else next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def library_key(compiler: str) -> str:
    """A name for what would come out of compiling: sources, flags, compiler and CPU."""
    return _key(compiler, _march(), os.stat(compiler).st_mtime_ns, tuple((p.name, p.stat().st_mtime_ns) for p in _sources()))


@functools.lru_cache(maxsize=8)
def _key(compiler: str, march: str, built_ns: int, sources: tuple[tuple[str, int], ...]) -> str:
    digest = hashlib.sha256("\0".join((*FLAGS, march, compiler, cpu_name(), torch.backends.cpu.get_cpu_capability(), torch.__version__, str(built_ns), "".join(name for name, _ in sources))).encode())
    for path in _sources():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _sources() -> list[Path]:
    return sorted(SOURCE.glob("*.[ch]"))


def _march() -> str:
    return os.environ.get("FUSEBOX_MARCH", "native")


def _load(compiler: str, key: str) -> Native:
    """From the cache, else compiled; a cached file that is broken is compiled anew."""
    path = cache_folder() / "kernels" / f"fusebox-{key}.so"
    try:
        if path.is_file():
            try:
                return Native(_open(path))
            except OSError as error:
                log.warning("the kept kernels are broken and compiled anew: %s", error)
                path.unlink(missing_ok=True)
        return Native(_open(_compiled(compiler, path)))
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or str(error)
        return Native(None, f"{compiler} failed: {str(said).strip()[:500]}")
    except OSError as error:
        return Native(None, f"the library cannot be built or loaded: {error}")


def _compiled(compiler: str, path: Path) -> Path:
    """Compile beside `path`, then put the file in its place; in a folder of its own where the cache cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scrap = tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-")
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="fusebox-kernels-")) / path.name
        scrap = tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-")
    with scrap as folder:
        sources = sorted(SOURCE.glob("*.c"))
        objects = [f"{folder}/{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # whoever asks first waits for it
            list(pool.map(lambda pair: _run([compiler, *FLAGS, _target(), "-c", str(pair[0]), "-o", pair[1]]), zip(sources, objects, strict=True)))
        _run([compiler, *FLAGS, "-shared", "-o", f"{folder}/{path.name}", *objects, "-lm"])
        os.replace(f"{folder}/{path.name}", path)
    return path


def _target() -> str:
    """The compiler's option for this CPU."""
    return f"-mcpu={_march()}" if os.uname().machine in ("aarch64", "arm64") else f"-march={_march()}"


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)


def _open(path: Path) -> ctypes.CDLL:
    """Load and ask for one value, so that a truncated file shows now.

    Raises:
        OSError: it cannot be loaded, or is not ours.
    """
    if path.stat().st_size < 4096:  # the dynamic loader may crash on a cut file instead of refusing it
        raise OSError(f"{path.name} is cut off")
    library = ctypes.CDLL(str(path))
    try:
        library.fusebox_tile.restype = ctypes.c_int64
        library.fusebox_tile()
    except AttributeError as error:
        raise OSError(f"{path.name} is not the library of these kernels") from error
    return library
