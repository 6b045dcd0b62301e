"""``galore-ft ablate``."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from galore_trainer.cli.options import Debug, Overrides, integers, names_of
from galore_trainer.cli.outcome import FAILED, INTERRUPTED
from galore_trainer.errors import OptionError

Name = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help="rank, rates, residual, cross_head, svd, methods, or a YAML file of yours.",
        autocompletion=names_of("studies"),
    ),
]
OutputDir = Annotated[
    str | None, typer.Option("--output-dir", metavar="TEXT", help="Folder of the study (default runs/ablate-STUDY).")
]
Seeds = Annotated[str | None, typer.Option("--seeds", metavar="0,1,2", help="Seeds, in place of the study's.")]
Jobs = Annotated[
    str,
    typer.Option(
        "--jobs",
        metavar="N|auto",
        help="Runs side by side, over all GPUs (auto: as many as their memory is estimated "
        "to hold); then a timing pass of each cell.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan; run nothing.")]
Only = Annotated[str | None, typer.Option("--only", metavar="TEXT", help="Run cells with this in their name.")]
MaxCells = Annotated[
    int | None, typer.Option("--max-cells", metavar="N", min=1, help="Most runs to start; the others wait.")
]
KeepModels = Annotated[
    bool, typer.Option("--keep-models", help="Keep trained weights; otherwise only results, logs and predictions.")
]
Timing = Annotated[
    bool, typer.Option("--timing/--no-timing", help="After runs side by side, time each cell alone on a device.")
]


def ablate(
    study: Name,
    overrides: Overrides = None,
    *,
    output_dir: OutputDir = None,
    seeds: Seeds = None,
    jobs: Jobs = "1",
    dry_run: DryRun = False,
    only: Only = None,
    max_cells: MaxCells = None,
    keep_models: KeepModels = False,
    timing: Timing = True,
    debug: Debug = False,
) -> None:
    """Run a study: galore-ft ablate STUDY [key=value ...]. Each cell and seed is a run of its own.

    Finished runs are skipped and others go on from their last checkpoint, so that the same command resumes a sweep.
    base=CONFIG chooses what is varied, for example base=mawps data.source=path/to/train.json.
    """
    from galore_trainer.run.study.grid import load_study

    number: int | Literal["auto"] = "auto" if jobs == "auto" else _count(jobs)
    loaded = load_study(study, overrides or (), None if seeds is None else integers("--seeds", seeds))
    output = Path(output_dir or f"runs/ablate-{loaded.name}").expanduser()
    if dry_run:
        from galore_trainer.run.study.sweep_plan import describe_sweep

        typer.echo(describe_sweep(loaded, output, jobs=number, only=only, max_cells=max_cells))
        return
    from galore_trainer.run.study.sweep import ablate as run_study

    flags = {"--output-dir": output, "--seeds": seeds, "--jobs": jobs, "--only": only, "--max-cells": max_cells}
    words = [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
    if not timing:
        words.append("--no-timing")
    outcome = run_study(
        loaded,
        output,
        jobs=number,
        only=only,
        max_cells=max_cells,
        keep_models=keep_models,
        timing=timing,
        command=shlex.join(["galore-ft", "ablate", study, *(overrides or ()), *words]),
        say=_say,
    )
    for name, reason in outcome.failed.items():
        typer.echo(f"failed: {name}: {reason}", err=True)
    if outcome.interrupted:
        typer.echo("interrupted; the same command goes on")
        raise typer.Exit(INTERRUPTED)
    if outcome.unfinished:
        typer.echo(f"{outcome.unfinished} runs are still to do: without --only and --max-cells the command goes on")
    else:
        typer.echo(f"tables and plots: galore-ft report {shlex.quote(str(output))}")
    if outcome.failed:
        raise typer.Exit(FAILED)


def _count(jobs: str) -> int:
    with contextlib.suppress(ValueError):
        if (number := int(jobs)) >= 1:
            return number
    raise OptionError("--jobs", jobs, "auto, or a number of at least 1")


def _say(text: str) -> None:
    print(text, flush=True)
