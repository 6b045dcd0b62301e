"""``galore-ft state export | import``."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from galore_trainer.cli.loading import load
from galore_trainer.cli.once import OptionsOnce
from galore_trainer.cli.options import Config, Debug, Overrides, with_flags
from galore_trainer.cli.train import LaunchConfig, Processes
from galore_trainer.errors import OptionError
from galore_trainer.run.launching.distributed import is_main_process

app = typer.Typer(
    help="Let a checkpoint go on under another launch: other processes, another backend.", no_args_is_help=True
)

Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint-N folder.")]
Output = Annotated[str, typer.Argument(metavar="OUTPUT_DIR", help="Gets a folder checkpoint-N.")]


@app.command("export", cls=OptionsOnce)
def export_(checkpoint: Checkpoint, output_dir: Output, debug: Debug = False) -> None:
    """Make a checkpoint of FSDP2 or ZeRO whole: one process and DDP resume from the new one. Needs no launcher.

    Weights are the float32 ones where DeepSpeed keeps such; the optimizer's state is put together by parameter name.
    """
    from galore_trainer.run.training.elastic import export_checkpoint

    target = export_checkpoint(checkpoint, output_dir)
    typer.echo(f"{target}: one process and DDP resume from it, FSDP2 and ZeRO after galore-ft state import")


@app.command("import", cls=OptionsOnce)
@with_flags
def import_(
    context: typer.Context,
    checkpoint: Checkpoint,
    config: Config = None,
    overrides: Overrides = None,
    *,
    flags: dict[str, Any],
    num_processes: Processes = None,
    launch_config: LaunchConfig = None,
    debug: Debug = False,
) -> None:
    """Cut a whole checkpoint for FSDP2 or ZeRO: galore-ft state import CHECKPOINT CONFIG [as for galore-ft train].

    The processes of that launch write their own checkpoint-N into output_dir; galore-ft train goes on from it with the
    same arguments and --resume auto.
    """
    run = load(config, overrides, flags)
    from galore_trainer.run.launching.launch import plan_launch, run_launch
    from galore_trainer.run.training.elastic import check_import, import_checkpoint

    check_import(checkpoint)

    launch = plan_launch(run, num_processes=num_processes, launch_config=launch_config)
    if launch is not None and launch.backend == "ddp":
        way_out = f"Resume from {checkpoint} itself: --resume {checkpoint}."
        raise OptionError("--launch-config", launch.name, "fsdp2, zero1, zero2 or zero3", way_out)
    if launch is not None:
        from galore_trainer.run.launching.start import choose_start

        choose_start(run, None, False)
        words = [str(word) for word in context.obj]
        typer.echo(shlex.join(["accelerate", "launch", *launch.command(words)]))
        if code := run_launch(launch, words):
            raise typer.Exit(code)
        return
    target = import_checkpoint(run, checkpoint)
    if is_main_process():
        typer.echo(f"{target}: galore-ft train goes on from it with the same arguments and --resume auto")
