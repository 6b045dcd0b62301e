"""``galore-ft data preview``."""

from __future__ import annotations

from typing import Annotated

import typer

from galore_trainer.cli.loading import load
from galore_trainer.cli.once import OptionsOnce
from galore_trainer.cli.options import Config, Debug, Overrides

app = typer.Typer(help="Look at the data before training.", no_args_is_help=True)

Model = Annotated[
    str | None, typer.Option("--model", metavar="TEXT", help="A folder, a hub id, or embedded:smollm2-135m.")
]
Count = Annotated[int, typer.Option("-n", "--examples", min=0, help="Examples shown in full.")]


@app.command(cls=OptionsOnce)
def preview(
    config: Config = None, overrides: Overrides = None, model: Model = None, examples: Count = 2, debug: Debug = False
) -> None:
    """Show examples with the tokens that are trained on, counts, lengths, and what is too long."""
    run = load(config, overrides, {"model_name_or_path": model} if model is not None else None)
    from galore_trainer.run.models.preview import preview as describe

    typer.echo(describe(run, examples))


@app.callback()
def _group() -> None:
    """Keep ``preview`` a subcommand."""
