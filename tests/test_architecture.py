"""Imports point one way and never in a circle, private names stay private, files and folders stay small."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from rooms import BEGIN, END, FOLDERS, PAGE, ROOT, import_graph, imported, modules, pictures, reachable

MODULES = modules()
BENCHMARKS = {f"benchmarks.{path.stem}": path for path in sorted((ROOT / "benchmarks").glob("*.py"))}
BASE = {"config", "errors"}
MAY_IMPORT = {
    "core": set(),
    "kernels": set(),
    "layouts": set(),
    "errors": set(),
    "config": {"errors"},
    "hub": {"errors"},
    "tables": set(),
    "metrics": {"errors"},
    "targets": {"core", "layouts", *BASE},
    "optim": {"core", "kernels", "layouts", "targets", *BASE},
    "hf": {"core", "layouts", "targets", "optim", "tables", *BASE},
    "recipes": {"metrics", "hub", *BASE},
    "run": {"core", "layouts", "targets", "optim", "hf", "metrics", "recipes", "configs", "hub", "tables", *BASE},
    "cli": {"run", "recipes", "configs", "hub", *BASE, "__version__"},
}
ONLY_TORCH = {"core", "layouts"}
FILES_IN_A_FOLDER = 12
# A step is read from end to end in one folder; a command and a task are a file each.
MORE_FILES = {"galore_trainer/optim": 18, "cli": 20, "recipes": 14}
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}  # public, though they begin with an underscore


@pytest.mark.parametrize("module", [name for name in MODULES if "." in name])
def test_imports_point_one_way(module: str):
    area = module.split(".")[1]
    for name in imported(MODULES[module]):
        top, *rest = name.split(".")
        if top == "galore_trainer":
            assert rest[0] in MAY_IMPORT[area] | {area}, f"{module} imports {name}"
        elif area in ONLY_TORCH:
            assert top == "torch" or top in sys.stdlib_module_names, f"{module} imports {name}"


def test_no_modules_import_each_other_in_a_circle():
    graph = import_graph()
    ahead = {module: reachable(graph, module) for module in graph}
    circles = {" <-> ".join(sorted(n for n in ahead[m] if m in ahead[n])) for m in graph if m in ahead[m]}
    assert not circles, "\n".join(circles)


def test_the_picture_of_the_rooms_is_the_one_that_the_imports_draw():
    text = PAGE.read_text(encoding="utf-8")
    assert BEGIN + pictures() + END in text, "run `python docs/rooms.py`"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(path: Path) -> set[str]:
    """Private names that a file defines: functions, classes, variables, fields."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if is_private(name)}


def test_no_module_uses_a_private_name_of_another():
    defined = {module: private_names(path) for module, path in MODULES.items()}
    ours = set().union(*defined.values()) - OF_NAMED_TUPLES
    uses = []
    for module, path in {**MODULES, **BENCHMARKS}.items():
        uses += [f"{module} imports {name}" for name in imported(path) if is_private(name.split(".")[-1])]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ours - defined.get(module, set()):
                uses.append(f"{module}:{node.lineno} uses {ast.unparse(node)}")
    assert not uses, "\n".join(uses)


@pytest.mark.parametrize("top", FOLDERS)
def test_a_folder_holds_few_files(top: str):
    folders = [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())]
    count = {str(f.relative_to(ROOT)): len([p for p in f.glob("*.py") if p.stem != "__init__"]) for f in folders}
    assert {name: n for name, n in count.items() if n > MORE_FILES.get(name, FILES_IN_A_FOLDER)} == {}


def test_no_file_is_too_long_to_read():
    folders = [ROOT / name for name in (*FOLDERS, "tests", "benchmarks", "docs")]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for f in folders for path in f.rglob("*.py")}
    assert {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > 400} == {}
