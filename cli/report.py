"""``galore-ft report``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from galore_trainer.cli.options import Debug

Runs = Annotated[list[str], typer.Argument(metavar="RUNS...", help="Folders of finished runs, or of one study.")]
Output = Annotated[
    str | None,
    typer.Option("-o", "--output-dir", metavar="DIR", help="Where to write (default STUDY/report, else report)."),
]
Title = Annotated[str | None, typer.Option("--title", help="Title of the report.")]


def report(runs: Runs, output: Output = None, title: Title = None, debug: Debug = False) -> None:
    """Write tables and plots of finished runs: report.html (one page), report.md and PNG files."""
    from galore_trainer.run.report.write import report as write

    target = Path(output) if output else Path(runs[0]) / "report" if len(runs) == 1 else Path("report")
    command = shlex.join(["galore-ft", "report", *runs, *(["-o", output] if output else [])])
    for path in write(runs, target.expanduser(), title=title, command=command):
        typer.echo(path)
