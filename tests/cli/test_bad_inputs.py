"""Bad inputs to every sub-command: exit code and message stand in ``docs/bad-inputs.md``, no traceback, no exit 0.

The commands stand in ``bad_inputs.txt``, one a line. UPDATE_BAD_INPUTS=1 in the environment of pytest writes the
table anew.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from galore_trainer.cli.main import main
from odd_files import write_odd_files

TABLE = Path(__file__).parents[2] / "docs" / "bad-inputs.md"
HEAD = """\
# Bad inputs

What the commands say to inputs that they cannot honour, and what they exit with: 1 a run that failed, 2 a command line
or configuration that is refused. `tests/cli/test_bad_inputs.py` makes this table and compares it; the files in it are
those of `tests/helpers/odd_files.py`. Words of other libraries are left out (`...`).

| Command | Exit | Message |
| --- | --- | --- |
"""
# What a library says differs by its version.
FOREIGN = (
    r"(?<=It says: ).*",
    r"(?<=transformers can read\. )(?!It says|Its ).*",
    r"(?<=wanted one of linear, ).*",
    r"(?<=^Usage: ).*?(?= Error: )",
    r"(?<=Invalid value for ')(.*': ).*",
    r"(?<= \(Possible options: ).*",
    r"(?<=No such command 'trian'\. ).*",
)

COMMANDS = Path(__file__).with_name("bad_inputs.txt").read_text(encoding="utf-8")
CASES = [line for line in COMMANDS.splitlines() if line]


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd")
    write_odd_files(path, tiny_model_dir)
    return path


@pytest.fixture(scope="module")
def said() -> Iterator[dict[str, str]]:
    """The table's rows as they come; written at the end where that is asked for."""
    rows: dict[str, str] = {}
    yield rows
    if os.environ.get("UPDATE_BAD_INPUTS"):
        TABLE.write_text(HEAD + "".join(rows[case] for case in CASES), encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_words(case: str, folder: Path, said: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = files_of(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(shlex.split(case))
    assert code in (1, 2), out.getvalue()
    assert "Traceback" not in err.getvalue() + out.getvalue()
    assert files_of(folder) == before, "it changed files"
    said[case] = row(case, code, err.getvalue(), folder)
    if not os.environ.get("UPDATE_BAD_INPUTS"):
        assert said[case] in TABLE.read_text(encoding="utf-8"), "UPDATE_BAD_INPUTS=1 writes docs/bad-inputs.md anew"


def files_of(folder: Path) -> dict[Path, int]:
    """Everything in a folder, and when each file was written."""
    return {path: path.stat().st_mtime_ns if path.is_file() else 0 for path in folder.rglob("*")}


def row(case: str, code: int, text: str, folder: Path) -> str:
    """A line of the table: one message without the place of the folder and without the words of libraries."""
    message = " ".join(text.replace(f"{folder}/", "").replace(str(folder), ".").split())
    for words in FOREIGN:
        message = re.sub(words, lambda match: f"{match[1] if match.re.groups else ''}...", message)
    assert message, "nothing was said"
    assert "shortest example" not in message, "it went as far as the data"
    return f"| `{cell(case)}` | {code} | {cell(message)} |\n"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


@pytest.mark.skipif("UPDATE_BAD_INPUTS" in os.environ, reason="the table is being written")
def test_the_table_is_long_enough_and_holds_nothing_else() -> None:
    lines = TABLE.read_text(encoding="utf-8").removeprefix(HEAD).splitlines()
    assert len(lines) == len(CASES) == len(set(CASES)) >= 120
    commands = {case.split()[0] for case in CASES}
    assert commands >= {
        "train",
        "eval",
        "estimate",
        "inspect",
        "score",
        "ablate",
        "bench",
        "report",
        "config",
        "data",
        "state",
        "doctor",
    }
