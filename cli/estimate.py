"""``galore-ft estimate`` and ``galore-ft inspect``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from galore_trainer.cli.loading import load, require_reach
from galore_trainer.cli.options import Config, Debug, Overrides, choices, integers, names_of, with_flags
from galore_trainer.run.settings.methods import Method
from galore_trainer.run.settings.run_config import load_own_settings, load_run_config

Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        metavar="A,B",
        help="Methods to compare; layerwise is galore_plus so.",
        autocompletion=choices(Method, many=True),
    ),
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, a hub id, or embedded:smollm2-135m.")]
Processes = Annotated[int | None, typer.Option("--num-processes", metavar="N", help="Count one of N processes.")]
Launch = Annotated[
    str | None,
    typer.Option(
        "--launch-config",
        metavar="NAME",
        help="ddp (default), fsdp2, zero1, zero2 or zero3.",
        autocompletion=names_of("launch", files=False),
    ),
]
Ranks = Annotated[str | None, typer.Option("--ranks", metavar="16,32", help="Ranks to compare.")]


@with_flags
def estimate(
    config: Config = None,
    overrides: Overrides = None,
    *,
    flags: dict[str, Any],
    methods: Methods = None,
    ranks: Ranks = None,
    num_processes: Processes = None,
    launch_config: Launch = None,
    debug: Debug = False,
) -> None:
    """Tell the memory that training would take, in GiB, method by method; loads no weights and needs no GPU.

    One step of forward, backward and optimizer is counted on tensors without content: at most the configuration's
    max_length tokens in each of per_device_train_batch_size rows.
    """
    run = load(config, overrides, flags, reach=("model",))
    from galore_trainer.run.memory.estimate import LAYERWISE, memory_table
    from galore_trainer.run.memory.estimate import estimate as count
    from galore_trainer.run.memory.per_process import layout_of

    layout = None
    if num_processes is not None or launch_config is not None:
        layout = layout_of(launch_config or "ddp", 2 if num_processes is None else num_processes)
    chosen = [LAYERWISE if name == "layerwise" else name for name in methods.split(",")] if methods else ()
    rows = count(run, chosen, integers("--ranks", ranks) if ranks else (), layout, say=_say)
    if layout is not None:
        typer.echo(f"each of {layout.processes} processes under {layout.name}, in GiB")
    memory_table(rows).show()


def _say(text: str) -> None:
    """Show progress to people, who have a terminal."""
    if sys.stderr.isatty():
        typer.echo(text, err=True)


def inspect(model: Model, overrides: Overrides = None, debug: Debug = False) -> None:
    """Show what would be projected, plain and frozen: galore-ft inspect MODEL [galore.rank=64 ...]; trains nothing.

    What training would refuse is refused here in the same words.
    """
    settings = [f"model_name_or_path={model}", *(overrides or ())]
    require_reach(load_own_settings(None, settings).model_name_or_path)
    from galore_trainer.run.memory.estimate import inspect as describe

    describe(load_run_config(None, settings)).show()
