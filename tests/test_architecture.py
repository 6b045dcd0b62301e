"""Imports point one way, the maths stands on torch alone, files stay short enough to read."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"galore_trainer": "galore_trainer", "cli": "galore_trainer.cli", "recipes": "galore_trainer.recipes"}
BASE = {"config", "errors"}
MAY_IMPORT = {
    "core": set(),
    "kernels": set(),
    "layouts": set(),
    "errors": set(),
    "config": {"errors"},
    "hub": {"errors"},
    "metrics": {"errors"},
    "targets": {"core", "layouts", *BASE},
    "optim": {"core", "kernels", "layouts", "targets", *BASE},
    "hf": {"core", "layouts", "targets", "optim", *BASE},
    "recipes": {"metrics", "hub", *BASE},
    "run": {"core", "layouts", "targets", "optim", "hf", "metrics", "recipes", "configs", "hub", *BASE},
    "cli": {"run", "recipes", "configs", "hub", *BASE, "__version__"},
}
ONLY_TORCH = {"core", "layouts"}


def modules() -> Iterator[tuple[str, Path]]:
    for folder, name in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((name, *inside)).removesuffix(".__init__"), path


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno} imports relatively"
            package = node.module == "galore_trainer"
            yield from (f"galore_trainer.{alias.name}" for alias in node.names) if package else [str(node.module)]


@pytest.mark.parametrize(("module", "path"), [pytest.param(*m, id=m[0]) for m in modules() if "." in m[0]])
def test_imports_point_one_way(module: str, path: Path):
    area = module.split(".")[1]
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "galore_trainer":
            assert rest[0] in MAY_IMPORT[area] | {area}, f"{module} imports {name}"
        elif area in ONLY_TORCH:
            assert top == "torch" or top in sys.stdlib_module_names, f"{module} imports {name}"


def test_no_file_is_too_long_to_read():
    folders = [ROOT / name for name in (*FOLDERS, "tests", "benchmarks")]
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in folders
        for path in folder.rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long
