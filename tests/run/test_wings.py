"""The folders of ``galore_trainer/run`` import each other in one direction, and each stays small enough to overlook."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "galore_trainer" / "run"
PREFIX = "galore_trainer.run."
BASE = {"device", "files"}
# A wing, and the wings that it may import. Each row names rows above it alone, so that there is no circle.
MAY_IMPORT: dict[str, set[str]] = {
    "device": set(),
    "files": set(),
    "settings": BASE,
    "models": {*BASE, "settings"},
    "scoring": {*BASE, "settings", "models"},
    "memory": {*BASE, "settings", "models"},
    "results": {*BASE, "settings", "models", "scoring", "memory"},
    "launching": {*BASE, "settings", "models", "memory", "results"},
    "training": {*BASE, "settings", "models", "scoring", "memory", "results", "launching"},
    "study": {*BASE, "settings", "scoring", "memory", "results", "launching"},
    "report": {*BASE, "settings", "results", "study"},
    "bench": {*BASE, "settings", "models", "results", "training"},
    "doctor": {*BASE, "models", "results"},
}
MOST_FILES = 12  # of a folder


def files() -> list[tuple[str, Path]]:
    """Every file with the name of its wing; a file beside the folders is a wing of its own."""
    paths = [path for path in sorted(RUN.rglob("*.py")) if path.name != "__init__.py"]
    return [(path.relative_to(RUN).with_suffix("").parts[0], path) for path in paths]


def imported_wings(path: Path) -> Iterator[str]:
    """The wings that a file imports anywhere: at its top, inside functions, or for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix(PREFIX).split(".")[0] for name in names if name.startswith(PREFIX))


def test_each_row_names_rows_above_it():
    rows = list(MAY_IMPORT)
    for place, wing in enumerate(rows):
        assert MAY_IMPORT[wing] <= set(rows[:place]), wing


def test_the_table_names_every_wing():
    assert {wing for wing, _ in files()} == MAY_IMPORT.keys()


@pytest.mark.parametrize(("wing", "path"), [pytest.param(*f, id=f[1].relative_to(RUN).as_posix()) for f in files()])
def test_a_wing_imports_what_the_table_allows(wing: str, path: Path):
    assert set(imported_wings(path)) <= MAY_IMPORT[wing] | {wing}


def test_no_folder_holds_more_files_than_one_overlooks():
    counts = {folder.name: len(list(folder.glob("*.py"))) - 1 for folder in [RUN, *(RUN / wing for wing in MAY_IMPORT)]}
    assert {name: count for name, count in counts.items() if count > MOST_FILES} == {}
