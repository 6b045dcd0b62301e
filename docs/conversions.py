"""The blocks of docs/migrating.md: a file of each program, and what ``galore-ft config convert`` makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from galore_trainer.run.settings.convert import Line

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "tests" / "fixtures" / "peers"
FILES = {
    "llama_factory": "llama_factory_galore.yaml",
    "axolotl": "axolotl_galore.yaml",
    "trl": "trl_sft.yaml",
    "transformers": "transformers_layerwise.yaml",
}
"""Blocks of the page, and the files that they show."""


def converted(block: str) -> str:
    """A file, ours, and what changed in meaning or has no counterpart."""
    from galore_trainer.run.settings.convert import convert

    file = PEERS / FILES[block]
    conversion = convert(str(file))
    parts = [
        f"Before:\n<!-- not run: a file of {conversion.tool} -->",
        fenced("yaml", file.read_text(encoding="utf-8")),
        f"After, as `galore-ft config convert {file.name}` prints it:",
        fenced("yaml", conversion.text),
        f"{conversion.count('mapped')} keys mean the same. These change their meaning, or are to be done by hand:\n",
        *(item(line) for line in conversion.lines if line.kind == "changed"),
    ]
    if missing := [item(line) for line in conversion.lines if line.kind == "missing"]:
        parts += ["\nThese have no counterpart:\n", *missing]
    return "\n".join(parts) + "\n"


def item(line: Line) -> str:
    """What became of a key, as an item of a list."""
    what, _, note = str(line).partition("  (")
    return f"- `{what}`{f': {note[:-1]}' if note else ''}"


def fenced(language: str, text: str) -> str:
    """A fenced block."""
    return f"```{language}\n{text}```"


def conversions() -> dict[str, str]:
    """The text of every block."""
    return {block: converted(block) for block in FILES}
