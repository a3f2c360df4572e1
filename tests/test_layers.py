"""The arrows of DESIGN.md: every import, lazy ones included, read from the source and checked against the layers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RANKS = {"core": 0, "kernels": 1, "optim": 2, "compression": 2, "engines": 3, "ui": 4, "app": 5, "commands": 5, "cli": 6}
OUTSIDE = ("benchmarks", "tests")  # they may import the product, never the other way round
KEPT_OUT_OF_UI = ("torch", "transformers")


@dataclass(frozen=True)
class Import:
    """`module` imports `target`; both are dotted names, `where` is a file and a line."""

    module: str
    target: str
    where: str


def product_files(root: Path) -> list[Path]:
    folders = [root / name for name in RANKS if (root / name).is_dir()]
    files = [root / f"{name}.py" for name in RANKS if (root / f"{name}.py").is_file()]
    return sorted([*files, *(p for folder in folders for p in folder.rglob("*.py"))])


def dotted_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Every import statement of a file, and `import_module("...")` of a literal."""
    module = dotted_name(path, root)
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            targets = [f"{origin}.{alias.name}".lstrip(".") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                targets = [node.args[0].value]
        for target in targets:
            yield Import(module, target, f"{path.relative_to(root)}:{node.lineno}")


def all_imports(root: Path) -> list[Import]:
    return [found for path in product_files(root) for found in imports_of(path, root)]


def technique_folder(name: str) -> str | None:
    """`optim.larosa` for any module of that folder; None outside the technique folders."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("optim", "compression") and len(parts) > 1 else None


def violations(root: Path) -> list[str]:
    """Every import that the design forbids, in words."""
    modules = {dotted_name(path, root) for path in product_files(root)}
    bad = []
    for found in all_imports(root):
        source, target = found.module.split(".")[0], found.target.split(".")[0]
        text = f"{found.where}: {found.module} imports {found.target}"
        if target in OUTSIDE:
            bad.append(f"{text}: the product does not use {target}")
        if source == "ui" and target in KEPT_OUT_OF_UI:
            bad.append(f"{text}: ui/ has no {target}")
        if target == "gradio" and source not in ("ui", "app"):
            bad.append(f"{text}: gradio stays in ui/ and app.py")
        if target not in RANKS:
            continue
        if RANKS[target] > RANKS[source]:
            bad.append(f"{text}: upwards")
        if {source, target} == {"optim", "compression"}:
            bad.append(f"{text}: optim and compression do not know each other")
        here, there = technique_folder(found.module), technique_folder(resolve(found.target, modules) or "")
        if here and there and here != there and source == target:
            bad.append(f"{text}: a technique does not import its sibling")
    return bad


def resolve(target: str, modules: set[str]) -> str | None:
    """The module behind `a.b.c`, where `c` may be a name inside the module `a.b`."""
    while target:
        if target in modules:
            return target
        target = target.rpartition(".")[0]
    return None


def cycle(root: Path) -> list[str]:
    """The modules of one import cycle, in order; empty when there is none."""
    modules = {dotted_name(path, root) for path in product_files(root)}
    graph: dict[str, set[str]] = {m: set() for m in modules}
    for found in all_imports(root):
        target = resolve(found.target, modules)
        if target and target != found.module:
            graph[found.module].add(target)
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph[module]):
            if found := visit(target, [*trail, module]):
                return found
        done.add(module)
        return []

    for start in sorted(modules):
        if found := visit(start, []):
            return found
    return []


def test_product_has_files_in_every_lower_layer() -> None:
    """An empty scan would make the tests below pass for nothing."""
    layers = {dotted_name(p, ROOT).split(".")[0] for p in product_files(ROOT)}
    assert {"core", "kernels", "optim", "compression", "engines"} <= layers
    assert len(all_imports(ROOT)) > 100


def test_imports_point_down_only() -> None:
    assert violations(ROOT) == []


def test_modules_form_no_import_cycle() -> None:
    assert cycle(ROOT) == []


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for folder in [*path.parents]:
            if folder == root:
                break
            (folder / "__init__.py").touch()
    return root


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("core/bundle.py", "from engines.pool import EnginePool", "upwards"),
        ("core/bundle.py", "def f():\n    import engines.pool", "upwards"),
        ("core/bundle.py", "import importlib\nimportlib.import_module('engines.pool')", "upwards"),
        ("core/bundle.py", "from .. import engines", "upwards"),
        ("kernels/gemv.py", "from optim.larosa import ops", "upwards"),
        ("engines/chat.py", "from ui.theme import CSS", "upwards"),
        ("ui/chat_tab.py", "import app", "upwards"),
        ("optim/larosa/technique.py", "from compression.quant.modules import pack", "do not know each other"),
        ("compression/quant/technique.py", "import optim.larosa.ops", "do not know each other"),
        ("optim/larosa/technique.py", "from optim.vattention.ops import pages", "sibling"),
        ("optim/larosa/technique.py", "from ..vattention import ops", "sibling"),
        ("optim/larosa/technique.py", "from optim import vattention", "sibling"),
        ("ui/chat_tab.py", "import torch.nn as nn", "ui/ has no torch"),
        ("ui/chat_tab.py", "from transformers import AutoTokenizer", "ui/ has no transformers"),
        ("engines/chat.py", "import gradio as gr", "gradio stays"),
        ("cli.py", "from gradio import Blocks", "gradio stays"),
        ("engines/chat.py", "from benchmarks.peers import run", "does not use benchmarks"),
    ],
)
def test_checker_catches_a_forbidden_import(tmp_path: Path, file: str, source: str, reason: str) -> None:
    root = tree(tmp_path, {"optim/vattention/ops.py": "", "optim/larosa/ops.py": "", file: source})
    found = violations(root)
    assert len(found) == 1
    assert reason in found[0]
    assert file in found[0]


def test_checker_admits_what_the_design_allows(tmp_path: Path) -> None:
    root = tree(tmp_path, {
        "core/bundle.py": "import torch",
        "optim/larosa/ops.py": "import torch",
        "optim/larosa/technique.py": "from optim.larosa.ops import top_k\nfrom . import ops\nfrom kernels import gemv\nfrom core.bundle import Bundle",
        "kernels/gemv.py": "from core import bundle",
        "engines/chat.py": "from optim.larosa.technique import LaRoSA\nfrom compression.quant import technique",
        "compression/quant/technique.py": "import core.bundle",
        "ui/chat_tab.py": "import gradio as gr\nfrom engines import chat",
        "app.py": "import gradio\nfrom ui import chat_tab",
        "cli.py": "from engines.chat import ChatService",
    })
    assert violations(root) == []
    assert cycle(root) == []


@pytest.mark.parametrize("lazy", [False, True], ids=["at the top", "inside a function"])
def test_checker_catches_an_import_cycle(tmp_path: Path, lazy: bool) -> None:
    back = "def f():\n    from core.a import x" if lazy else "from core.a import x"
    root = tree(tmp_path, {"core/a.py": "from core.b import y", "core/b.py": "import core.c", "core/c.py": back})
    assert cycle(root) == ["core.a", "core.b", "core.c", "core.a"]
