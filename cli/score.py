"""``galore-ft score``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from galore_trainer.cli.options import Debug

Task = Annotated[
    str, typer.Option("--task", metavar="e2e|gsm8k|mawps", help="Five text metrics, or exact match of numbers.")
]
Predictions = Annotated[
    str,
    typer.Option(
        "--predictions", metavar="FILE", help="JSON lines with 'prediction'; for e2e also one prediction a line."
    ),
]
References = Annotated[
    str,
    typer.Option(
        "--references",
        metavar="FILE",
        help="JSON lines with 'answer'; for e2e a CSV with mr and ref, or lines with a blank line between examples.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the scores as JSON on standard output.")]


def score(
    task: Task, predictions: Predictions, references: References, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Score any system's output file: galore-ft score --task e2e --predictions FILE --references FILE."""
    from galore_trainer.run.scoring.score import score_files
    from galore_trainer.run.scoring.scores import as_lines

    scores = score_files(task, predictions, references)
    typer.echo(json.dumps(scores, indent=2, ensure_ascii=False) if as_json else "\n".join(as_lines(scores)))
