"""What a source file defines, read without importing it."""

from __future__ import annotations

import ast
from pathlib import Path


def defined_names(path: Path) -> set[str]:
    """Names at the top of a file: ``function``, ``Class``, ``Class.method``, ``CONSTANT``."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            targets = [inner for t in targets for inner in (t.elts if isinstance(t, ast.Tuple) else [t])]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names
