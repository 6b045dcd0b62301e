"""``galore-ft train``."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from galore_trainer.cli.loading import load
from galore_trainer.cli.options import Config, Debug, Overrides, names_of, with_flags
from galore_trainer.cli.outcome import INTERRUPTED
from galore_trainer.errors import OptionError
from galore_trainer.run.launching.distributed import is_main_process

Resume = Annotated[
    str | None,
    typer.Option("--resume", metavar="auto|PATH", help="Go on from the last checkpoint, or from this one."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete what an earlier run left in output_dir.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan; train nothing.")]
Processes = Annotated[
    int | None, typer.Option("--num-processes", metavar="N", help="Train on N processes, one a GPU (default one here).")
]
LaunchConfig = Annotated[
    str | None,
    typer.Option(
        "--launch-config",
        metavar="NAME|FILE",
        help="ddp (default), fsdp2, zero1, zero2, zero3, or accelerate's YAML.",
        autocompletion=names_of("launch"),
    ),
]
ShowConfig = Annotated[bool, typer.Option("--show-config", help="Print the resolved configuration and stop.")]


@with_flags
def train(
    context: typer.Context,
    config: Config = None,
    overrides: Overrides = None,
    *,
    flags: dict[str, Any],
    resume: Resume = None,
    overwrite: Overwrite = False,
    num_processes: Processes = None,
    launch_config: LaunchConfig = None,
    dry_run: DryRun = False,
    show_config: ShowConfig = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model: galore-ft train CONFIG [key=value ...] [flags].

    Values come from defaults, below the YAML file, below key=value and flags. Top-level keys are the fields of
    transformers.TrainingArguments; a flag such as --rank is short for galore.rank=. With --num-processes or
    --launch-config the run is started on several processes by accelerate launch.
    """
    if resume is not None and overwrite:
        both = f"--resume {resume} and --overwrite"
        raise OptionError("--overwrite", both, "one of the two", "To go on, leave out --overwrite.")
    run = load(config, overrides, flags, reach=() if show_config else ("data", "model"))
    if show_config:
        if is_main_process():
            typer.echo(run.to_yaml().rstrip())
        return
    from galore_trainer.run.launching.launch import plan_launch, run_launch

    launch = plan_launch(run, num_processes=num_processes, launch_config=launch_config)
    if dry_run:
        from galore_trainer.run.launching.plan import describe_plan
        from galore_trainer.run.launching.preflight import check_all
        from galore_trainer.run.launching.start import choose_start

        check_all(run, launch.processes if launch else None)
        if resume or overwrite:
            choose_start(run, resume, overwrite, typer.echo)
        plan = describe_plan(run, launch)
        if is_main_process():
            typer.echo(plan)
        return
    if launch is not None:
        from galore_trainer.run.launching.start import choose_start

        choose_start(run, resume, overwrite)
        words = [str(word) for word in context.obj]
        typer.echo(shlex.join(["accelerate", "launch", *launch.command(words)]))
        if code := run_launch(launch, words):
            raise typer.Exit(code)
        return
    from galore_trainer.run.training.train import train as train_run

    result = train_run(run, resume=resume, overwrite=overwrite)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
