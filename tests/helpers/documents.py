"""The fenced blocks of README and of the pages in docs/, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.S | re.M)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: ``python``, ``bash``, ``yaml``, ``json``, or nothing.
        code: what stands between the fences.
        not_run: why a test only parses it; empty where it is run.
    """

    language: str
    code: str
    not_run: str


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a page in a language, in order."""
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(name, code, reason) for reason, name, code in found if name == language]


def commands(block: Block) -> list[list[str]]:
    """The words of each line of a bash block, without comments."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def galore_ft(words: list[str]) -> list[str] | None:
    """What follows ``galore-ft`` or ``-m galore_trainer.cli`` in a command; None for another command."""
    if words[0] == "galore-ft":
        return words[1:]
    module = "galore_trainer.cli"
    return words[words.index(module) + 1 :] if module in words else None


def understood(words: list[str]) -> None:
    """Parse a command line; for ``train`` resolve its configuration, too. Raises what the command would raise."""
    import typer

    from galore_trainer.cli.app import app
    from galore_trainer.cli.main import main

    words = words[: words.index(">")] if ">" in words else words
    command: Any = typer.main.get_command(app)
    context = command.make_context("galore-ft", list(words), obj=list(words))
    while hasattr(command, "resolve_command"):
        rest = [*getattr(context, "_protected_args", []), *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    if words[0] == "train":
        assert main([*words, "--show-config"]) == 0, words
