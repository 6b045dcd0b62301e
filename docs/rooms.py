"""Which module imports which, read from the source; ``python docs/rooms.py`` draws it in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from blocks import write_block

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"galore_trainer": "galore_trainer", "cli": "galore_trainer.cli", "recipes": "galore_trainer.recipes"}
PAGE = ROOT / "CONTRIBUTING.md"
Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """The installed name of every module, with its file."""
    named = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            named[".".join((package, *inside)).removesuffix(".__init__")] = path
    return named


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def import_graph() -> Graph:
    """Every module, with those of ours that it imports; ``from module import name`` counts as ``module``."""
    known = modules()
    graph = {}
    for module, path in known.items():
        names = {name if name in known else name.rpartition(".")[0] for name in imported(path)}
        graph[module] = names & known.keys() - {module}
    return graph


def rooms(inside: str) -> Graph:
    """The folders and files right inside a package, with those that each imports."""
    graph: Graph = {}
    for module, names in import_graph().items():
        ends = [name[len(inside) + 1 :].split(".")[0] for name in (module, *names) if name.startswith(inside + ".")]
        if module.startswith(inside + "."):
            graph.setdefault(ends[0], set()).update(set(ends[1:]) - {ends[0]})
    return graph


def reachable(graph: Graph, name: str) -> set[str]:
    """Everything that ``name`` imports, directly or through others."""
    seen: set[str] = set()
    ahead = set(graph[name])
    while ahead:
        seen |= ahead
        ahead = {further for step in ahead for further in graph[step]} - seen
    return seen


def without_detours(graph: Graph) -> Graph:
    """The graph without the arrows that longer ways imply."""
    return {name: ends - set().union(*(reachable(graph, end) for end in ends)) for name, ends in graph.items()}


def picture(inside: str) -> str:
    """A Mermaid flowchart: an arrow leads from a room to what it imports."""
    arrows = [f"    {name} --> {end}" for name, ends in without_detours(rooms(inside)).items() for end in sorted(ends)]
    return "\n".join(("```mermaid", "flowchart TD", *arrows, "```", ""))


def pictures() -> str:
    """What stands in CONTRIBUTING.md."""
    return f"{picture('galore_trainer')}\nInside `run/`:\n{picture('galore_trainer.run')}"


def main() -> None:
    """Write the pictures."""
    write_block(PAGE, "rooms", pictures())


if __name__ == "__main__":
    main()
