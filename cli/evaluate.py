"""``galore-ft eval``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from galore_trainer.cli.loading import load, split_overrides
from galore_trainer.cli.options import Config, Debug, Overrides, models
from galore_trainer.run.launching.distributed import is_main_process
from galore_trainer.run.scoring.scores import as_lines
from galore_trainer.run.settings.run_config import RESOLVED_CONFIG

Target = Annotated[
    str,
    typer.Argument(
        metavar="MODEL_OR_RUN", help="A run's folder, a model's folder, or a hub id.", autocompletion=models
    ),
]
Limit = Annotated[str | None, typer.Option("--limit", metavar="INTEGER", help="Problems to score (eval.limit).")]
Predictions = Annotated[
    str | None, typer.Option("--predictions", metavar="FILE", help="Write each prompt and prediction as JSON lines.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the scores as JSON on standard output.")]


def evaluate(
    model_or_run: Target,
    config: Config = None,
    overrides: Overrides = None,
    *,
    limit: Limit = None,
    predictions: Predictions = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Score a model on held-out problems: galore-ft eval MODEL_OR_RUN [CONFIG] [key=value ...].

    A run's folder brings its own configuration; any other model needs CONFIG to say on which data.
    """
    name, rest = split_overrides(config, overrides)
    saved = Path(model_or_run).expanduser() / RESOLVED_CONFIG
    if name is None and saved.is_file():
        name = str(saved)
    run = load(name, rest, {} if limit is None else {"eval.limit": limit}, model=model_or_run)

    from galore_trainer.run.scoring.evaluate import evaluate as evaluate_model
    from galore_trainer.run.training.progress import counting

    with counting("generated", file=sys.stderr, silent=not is_main_process()) as progress:
        scores = evaluate_model(model_or_run, run, predictions_path=predictions, progress=progress)
    if is_main_process():
        typer.echo(json.dumps(scores, indent=2, ensure_ascii=False) if as_json else "\n".join(as_lines(scores)))
