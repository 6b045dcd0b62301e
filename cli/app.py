"""The tree of commands of ``galore-ft``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from galore_trainer.cli import config, data, state
from galore_trainer.cli.ablate import ablate
from galore_trainer.cli.bench import bench
from galore_trainer.cli.chat import chat
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
# Command -> its line in the list of commands, which the parser would cut from the longer help.
_COMMANDS: dict[Callable[..., None], str] = {
    train: "Fine-tune a model and score it before and after.",
    evaluate: "Score a model on held-out problems.",
    chat: "Talk to a trained model in the terminal.",
    estimate: "Tell the memory that training would take.",
    inspect: "Show what would be projected, plain and frozen.",
    score: "Score any system's output file.",
    ablate: "Run a study: a grid of settings, over seeds.",
    bench: "Time GaLore+ against other methods.",
    report: "Write tables and plots of finished runs.",
    doctor: "Report versions, device and what is missing.",
}
for _command, _line in _COMMANDS.items():
    _name = "eval" if _command is evaluate else _command.__name__
    app.command(_name, cls=OptionsOnce, short_help=_line)(_command)
app.add_typer(config.app, name="config", short_help="List, show, check and convert configurations.")
app.add_typer(data.app, name="data", short_help="Look at the data before training.")
app.add_typer(state.app, name="state", short_help="Let a checkpoint go on under another launch.")


def _print_version(value: bool) -> None:
    if value:
        from galore_trainer.versions import DISTRIBUTION, version

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
