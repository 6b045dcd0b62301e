"""The tree of commands of ``galore-ft``."""

from __future__ import annotations

from typing import Annotated

import typer

from galore_trainer.cli import config, data, state
from galore_trainer.cli.ablate import ablate
from galore_trainer.cli.bench import bench
from galore_trainer.cli.doctor import doctor
from galore_trainer.cli.estimate import estimate, inspect
from galore_trainer.cli.evaluate import evaluate
from galore_trainer.cli.once import OptionsOnce
from galore_trainer.cli.options import Debug
from galore_trainer.cli.report import report
from galore_trainer.cli.score import score
from galore_trainer.cli.train import train

app = typer.Typer(
    name="galore-ft",
    help="Fine-tune language models with GaLore+: galore-ft train quickstart.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: names are never cut, and one can search it
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for _name, _command in {
    "train": train,
    "eval": evaluate,
    "estimate": estimate,
    "inspect": inspect,
    "score": score,
    "ablate": ablate,
    "bench": bench,
    "report": report,
}.items():
    app.command(_name, cls=OptionsOnce)(_command)
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(state.app, name="state")
app.command(cls=OptionsOnce)(doctor)


def _print_version(value: bool) -> None:
    if value:
        from galore_trainer.run.doctor import DISTRIBUTION, version

        typer.echo(f"{DISTRIBUTION} {version(DISTRIBUTION)}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    pass
