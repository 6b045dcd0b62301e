"""``galore-ft doctor``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from galore_trainer.cli.options import Debug

AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Report versions, device, memory, what is missing, and the command that gets it."""
    from galore_trainer.run.doctor import examine, render

    report = examine()
    typer.echo(json.dumps(report, indent=2) if as_json else render(report))
