"""Notebooks run at tiny size, and show what the code that they hold has printed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="dev extra not installed")
pytest.importorskip("ipykernel", reason="dev extra not installed")

import nbformat

import notebooks as written

TINY = {
    "quickstart": "os.environ.update(MODEL={model!r}, RANK='4', STEPS='2', PROBLEMS='2')",
    "replace_galore_adamw": "MODEL, RANK, STEPS, LENGTH = {model!r}, 4, 2, 8",
    "8b_on_24gb": "SHAPE.update(vocab_size=256, hidden_size=64, intermediate_size=112, num_hidden_layers=2, "
    "num_attention_heads=4, num_key_value_heads=2, head_dim=16)",
}
COMMANDS = r"""
import os, shlex
from galore_trainer.cli.main import main


def bash(line, cell):
    for command in cell.replace("\\\n", " ").strip().splitlines():
        program, *words = shlex.split(os.path.expandvars(command))
        assert program == "galore-ft" and main(words) == 0, command


get_ipython().register_magic_function(bash, "cell")
"""
"""Runs the commands of %%bash cells in the kernel itself, where torch is imported once."""
SHOWS = {
    "quickstart": ["exact match", "optimizer state", "wanted"],
    "replace_galore_adamw": ["galore_adamw", "equal to the uninterrupted run: True"],
    "8b_on_24gb": ["layerwise", "adamw", "projected"],
}


def printed(book: nbformat.NotebookNode) -> str:
    return "".join(out.get("text", "") for cell in written.code(book) for out in cell.outputs)


@pytest.mark.parametrize("path", written.notebooks(), ids=lambda path: path.stem)
def test_it_runs(path: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "galore_adamw" in path.read_text(encoding="utf-8"):
        pytest.importorskip("galore_torch", reason="parity extra not installed")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    tiny = TINY[path.stem].format(model=str(tiny_model_dir))
    out = printed(written.run(path, tmp_path, tiny + COMMANDS))
    assert [words for words in SHOWS[path.stem] if words not in out] == []


@pytest.mark.parametrize("path", written.notebooks(), ids=lambda path: path.stem)
def test_what_it_shows_was_printed_by_the_code_that_it_holds(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert book.metadata.get("ran") == written.digest(book), "run `make notebooks`"
    assert all(cell.execution_count for cell in written.code(book))
    assert [words for words in SHOWS[path.stem] if words not in printed(book)] == []
    assert all(cell.outputs == [] for cell in book.cells if written.NOT_RUN in cell.metadata.get("tags", []))
