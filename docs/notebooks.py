"""Run the notebooks of docs/notebooks and keep what they print: ``make notebooks``, some minutes on a quiet machine.

A notebook keeps its printed lines alone, without times, machines or progress bars (which come on stderr), so that its
changes can be read. ``ran`` in its metadata says which code printed them.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_output

FOLDER = Path(__file__).resolve().parent / "notebooks"
NOT_RUN = "skip-execution"
"""The tag of a cell that needs a GPU; nbclient leaves it out."""


def notebooks() -> list[Path]:
    """Every notebook."""
    return sorted(FOLDER.glob("*.ipynb"))


def code(book: Any) -> Iterator[Any]:
    """The cells of a notebook that are run."""
    return (cell for cell in book.cells if cell.cell_type == "code" and NOT_RUN not in cell.metadata.get("tags", []))


def digest(book: Any) -> str:
    """A name for the code that is run: another one where a character of it differs."""
    return hashlib.sha256("\n\n".join(cell.source for cell in code(book)).encode()).hexdigest()[:16]


def run(path: Path, folder: Path, parameters: str = "") -> Any:
    """Run a notebook and return it with its outputs; an error in a cell is raised.

    Args:
        path: the notebook.
        folder: working directory of its kernel.
        parameters: code that runs after the cell with the tag ``parameters``, to make it smaller.
    """
    book = nbformat.read(path, as_version=4)
    for cell in code(book):
        cell.outputs = []
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += f"\n{parameters}" if parameters else ""
    # commands such as galore-ft are those of this environment
    found_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    client = NotebookClient(book, timeout=1200, record_timing=False, resources={"metadata": {"path": str(folder)}})
    quiet = {
        "PYTHONWARNINGS": "ignore",
        "NO_COLOR": "1",
        "DS_ACCELERATOR": "cpu",
    }  # DeepSpeed would say that it chose it
    client.execute(env={**os.environ, **quiet, "PATH": found_first})
    for cell in code(book):
        printed = "".join(out.text for out in cell.outputs if out.get("name") == "stdout")  # it comes in many pieces
        cell.outputs = [new_output("stream", name="stdout", text=printed)] if printed else []
    return book


def main(names: Sequence[str]) -> None:
    """Run the notebooks of these names, or all."""
    for path in notebooks():
        if not names or path.stem in names:
            with tempfile.TemporaryDirectory() as folder:
                book = run(path, Path(folder))
            book.metadata = {
                "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                "language_info": {"name": "python"},
                "ran": digest(book),
            }
            nbformat.write(book, path)
            print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
