"""Imports point one way and never in a circle, private names stay private, files and folders stay small."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from blocks import read_block
from rooms import FOLDERS, PAGE, ROOT, import_graph, imported, modules, pictures, reachable, rooms
from source import defined_names

MODULES = modules()
BENCHMARKS = {f"benchmarks.{path.stem}": path for path in sorted((ROOT / "benchmarks").glob("*.py"))}
BASE = {"errors", "fields", "config"}
GROUND = {"core", "layouts", "tables", "timing", "versions", *BASE}
ROOMS: dict[str, set[str]] = {
    "core": set(),
    "kernels": set(),
    "layouts": set(),
    "errors": set(),
    "fields": set(),
    "timing": set(),
    "tables": set(),
    "config": {"errors", "fields"},
    "hub": {"errors"},
    "versions": {"errors"},
    "metrics": {"errors"},
    "targets": {"core", "layouts", *BASE},
    "optim": {"core", "kernels", "layouts", "targets", "timing", *BASE},
    "hf": {"core", "layouts", "targets", "optim", "tables", *BASE},
    "recipes": {"metrics", "hub", *BASE},
    "run": {"targets", "optim", "hf", "metrics", "recipes", "hub", *GROUND},
    "integrations": {"optim", "hf", "run", *BASE},
    "cli": {"run", "recipes", "hub", "versions", *BASE},
}
OF_RUN = {"device", "files"}
WINGS: dict[str, set[str]] = {
    "device": set(),
    "files": set(),
    "settings": OF_RUN,
    "models": {*OF_RUN, "settings"},
    "scoring": {*OF_RUN, "settings", "models"},
    "memory": {*OF_RUN, "settings", "models"},
    "results": {*OF_RUN, "settings", "models", "scoring", "memory"},
    "launching": {*OF_RUN, "settings", "models", "memory", "results"},
    "training": {*OF_RUN, "settings", "models", "scoring", "memory", "results", "launching"},
    "study": {*OF_RUN, "settings", "scoring", "memory", "results", "launching"},
    "report": {*OF_RUN, "settings", "results", "study"},
    "bench": {*OF_RUN, "settings", "models", "results", "training"},
    "doctor": {*OF_RUN, "models", "results"},
    "chat": {*OF_RUN, "settings", "models", "launching"},
}
MAY_IMPORT = {"galore_trainer": ROOMS, "galore_trainer.run": WINGS}
"""For each package its rooms, from the ground up, with the rooms that each may import."""
ONLY_TORCH = {"core", "layouts"}
OTHER_TRAINERS = {"axolotl", "llamafactory", "pydantic", "swift", "unsloth"}
FILES_IN_A_FOLDER = 12
# A step is read from end to end in one folder. A command and a task are a file each, whatever their number.
MORE_FILES = {"galore_trainer/optim": 22, "cli": 21, "recipes": 16}
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}  # public, though they begin with an underscore


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_room_imports_what_the_table_allows(package: str):
    imports, table = rooms(package), MAY_IMPORT[package]
    assert imports.keys() == table.keys()
    assert {room: names - table[room] for room, names in imports.items() if names - table[room]} == {}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_row_of_the_table_names_rows_above_it(package: str):
    table = MAY_IMPORT[package]
    above: set[str] = set()
    for room, names in table.items():
        assert names <= above, room
        above.add(room)


def test_the_mathematics_imports_torch_alone():
    outside = []
    for module, path in MODULES.items():
        if module.split(".")[1:2] and module.split(".")[1] in ONLY_TORCH:
            tops = {name.split(".")[0] for name in imported(path)} - {"torch", "galore_trainer"}
            outside += [f"{module} imports {top}" for top in tops - sys.stdlib_module_names]
    assert outside == []


def test_programs_that_have_a_plugin_are_imported_by_it_alone():
    users = {module for module, path in MODULES.items() if {n.split(".")[0] for n in imported(path)} & OTHER_TRAINERS}
    assert users == {"galore_trainer.integrations.axolotl", "galore_trainer.integrations.ms_swift"}


def test_what_benchmarks_import_is_there():
    names = {name for path in BENCHMARKS.values() for name in imported(path) if name.startswith("galore_trainer.")}
    missing = []
    for name in sorted(names - MODULES.keys()):
        module, _, attribute = name.rpartition(".")
        if module not in MODULES or attribute not in defined_names(MODULES[module]):
            missing.append(name)
    assert missing == []


def test_no_modules_import_each_other_in_a_circle():
    graph = import_graph()
    ahead = {module: reachable(graph, module) for module in graph}
    circles = {" <-> ".join(sorted(n for n in ahead[m] if m in ahead[n])) for m in graph if m in ahead[m]}
    assert not circles, "\n".join(circles)


def test_the_picture_of_the_rooms_is_the_one_that_the_imports_draw():
    assert read_block(PAGE, "rooms") == pictures(), "run `python docs/rooms.py`"


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
