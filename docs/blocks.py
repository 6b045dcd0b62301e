"""Marked blocks of pages: ``<!-- NAME: written by ... -->``, what a script writes, ``<!-- end of NAME -->``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}: [^\n]* -->\n)(.*?)(<!-- end of {name} -->)", re.S)


def read_block(page: Path, name: str) -> str:
    """What stands in a block now."""
    match = _pattern(name).search(page.read_text(encoding="utf-8"))
    assert match, f"{page.name} has no block {name}"
    return match[2]


def write_block(page: Path, name: str, text: str) -> None:
    """Put a text in the place of what stands in a block."""
    read_block(page, name)
    old = page.read_text(encoding="utf-8")
    page.write_text(_pattern(name).sub(lambda match: match[1] + text + match[3], old), encoding="utf-8")


def table(rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """A Markdown table; its first row is the head, its last ``numbers`` columns stand to the right."""
    rule = ["---"] * (len(rows[0]) - numbers) + ["---:"] * numbers
    return "".join("| " + " | ".join(row) + " |\n" for row in (rows[0], rule, *rows[1:]))
