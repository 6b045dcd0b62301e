"""The command ``galore-ft``: its tree of commands, and what an error looks like and exits with.

Exit codes: 0 done, 1 the run failed, 2 a command line or configuration that cannot be honoured, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from galore_trainer.cli import config, data, state
from galore_trainer.cli.ablate import ablate
from galore_trainer.cli.bench import bench
from galore_trainer.cli.doctor import doctor
from galore_trainer.cli.estimate import estimate, inspect
from galore_trainer.cli.evaluate import evaluate
from galore_trainer.cli.loading import is_main_process
from galore_trainer.cli.options import Debug
from galore_trainer.cli.report import report
from galore_trainer.cli.score import score
from galore_trainer.cli.train import INTERRUPTED, train
from galore_trainer.errors import OptionError

FAILED, USAGE = 1, 2
SECONDS_FOR_RANK_0 = 3.0
EXPECTED = (RuntimeError, OSError, ValueError, ImportError, MemoryError)

app = typer.Typer(
    name="galore-ft",
    help="Fine-tune language models with GaLore+: galore-ft train quickstart.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: names are never cut, and one can search it
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command()(train)
app.command("eval")(evaluate)
app.command()(estimate)
app.command()(inspect)
app.command()(score)
app.command()(ablate)
app.command()(bench)
app.command()(report)
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(state.app, name="state")
app.command()(doctor)


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


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; ``sys.argv`` where ``args`` is None."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        code = app(args, prog_name="galore-ft", standalone_mode=False, obj=args)
    except (KeyboardInterrupt, typer.Abort):
        _say("Interrupted.")
        return INTERRUPTED
    except Exception as error:
        return _report(error, debug="--debug" in args)
    return code if isinstance(code, int) else 0


def _report(error: Exception, *, debug: bool) -> int:
    usage = hasattr(error, "format_message") and hasattr(error, "show")  # the command-line parser's own
    code = USAGE if usage or isinstance(error, OptionError) else FAILED
    rank = "" if is_main_process() else f" on rank {os.environ['RANK']}"
    if rank and code == USAGE:
        # Most such errors are found by every rank: rank 0 tells, and its launcher ends the others meanwhile.
        time.sleep(SECONDS_FOR_RANK_0)
    if debug or not (usage or isinstance(error, EXPECTED)):
        traceback.print_exception(error)
    elif usage and not rank:
        error.show()  # type: ignore[attr-defined]
    elif code == USAGE:
        _say(f"Error{rank}: {error}")
    else:
        _say(f"Failed{rank}: {' '.join(str(error).split()) or type(error).__name__}")
        _say("Add --debug for the full traceback.")
    return code


def _say(text: str) -> None:
    typer.echo(text, err=True)


if __name__ == "__main__":
    sys.exit(main())
