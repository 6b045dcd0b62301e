"""``galore-ft estimate`` and ``galore-ft inspect``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from galore_trainer.cli.loading import load, require_reach
from galore_trainer.cli.options import Config, Debug, Overrides, integers, with_flags
from galore_trainer.run.config import load_own_settings, load_run_config

Methods = Annotated[
    str | None, typer.Option("--methods", metavar="A,B", help="Methods to compare; layerwise is galore_plus so.")
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, a hub id, or embedded:smollm2-135m.")]
Ranks = Annotated[str | None, typer.Option("--ranks", metavar="16,32", help="Ranks to compare.")]


@with_flags
def estimate(
    config: Config = None,
    overrides: Overrides = None,
    *,
    flags: dict[str, Any],
    methods: Methods = None,
    ranks: Ranks = None,
    debug: Debug = False,
) -> None:
    """Tell the memory that training would take, in GiB, method by method; loads no weights and needs no GPU.

    One step of forward, backward and optimizer is counted on tensors without content: at most the configuration's
    max_length tokens in each of per_device_train_batch_size rows.
    """
    run = load(config, overrides, flags, reach=("model",))
    from galore_trainer.run.estimate import CHOICES, LAYERWISE, as_table
    from galore_trainer.run.estimate import estimate as count

    chosen = [LAYERWISE if name == "layerwise" else name for name in methods.split(",")] if methods else CHOICES
    typer.echo(as_table(count(run, chosen, integers("--ranks", ranks) if ranks else ())))


def inspect(model: Model, overrides: Overrides = None, debug: Debug = False) -> None:
    """Show what would be projected, plain and frozen: galore-ft inspect MODEL [galore.rank=64 ...]; trains nothing.

    What training would refuse is refused here in the same words.
    """
    settings = [f"model_name_or_path={model}", *(overrides or ())]
    require_reach(load_own_settings(None, settings).model_name_or_path)
    from galore_trainer.run.estimate import inspect as describe

    typer.echo(describe(load_run_config(None, settings)))
