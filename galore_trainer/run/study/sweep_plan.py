"""The plan of a sweep: its runs, their steps, and an estimate of the time from finished runs."""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from galore_trainer.errors import OptionError
from galore_trainer.run.study.grid import Study, show_value
from galore_trainer.run.study.record import FINISHED, Job, Record, timing_config
from galore_trainer.run.study.sweep_memory import choose_jobs, visible_devices


def select(record: Record, only: str | None) -> list[Job]:
    """The runs still to do, of cells whose name or folder holds ``only``."""
    wanted = [job for job in record.runs if only is None or only.lower() in f"{job.name}\n{job.folder}".lower()]
    if not wanted:
        cells = ", ".join(cell.name for cell in record.study.cells)
        raise OptionError("--only", only, "part of a cell's name", f"The cells are {cells}.")
    return [job for job in wanted if job.entry["status"] != FINISHED]


def count_all_steps(study: Study) -> dict[str, int]:
    """Optimizer steps of a run of each cell, by slug; loads the data, so that a bad source is refused at once."""
    from galore_trainer.recipes import load_also, load_data
    from galore_trainer.run.launching.plan import count_steps
    from galore_trainer.run.settings.arguments import training_arguments

    examples: dict[str, int] = {}
    steps = {}
    for cell in study.cells:
        config = next(iter(cell.configs.values()))
        key = f"{config.data} {config.eval.also}"
        if key not in examples:
            data = load_data(config.data)
            load_also(config.eval.also, data.train)
            examples[key] = len(data.train)
        steps[cell.slug] = count_steps(training_arguments(config), examples[key])[0]
    return steps


def describe_sweep(
    study: Study,
    output: Path,
    *,
    jobs: int | Literal["auto"] = 1,
    only: str | None = None,
    max_cells: int | None = None,
) -> str:
    """The plan of ``ablate`` with the same arguments, in lines; changes nothing.

    Raises:
        OptionError: what ``ablate`` would refuse.
    """
    record = Record(study, output)
    todo = select(record, only)[:max_cells]
    steps = count_all_steps(study)
    reason = ""
    if jobs == "auto":
        environment = dict(os.environ)
        jobs, reason = choose_jobs([job.config for job in todo], visible_devices(environment), environment)
    width = max(len(cell.name) for cell in study.cells) + 2
    lines = [
        f"{study.title}: {study.question}".rstrip(": "),
        f"{len(study.cells)} cells x {len(study.seeds)} seeds of {study.base}, into {output}",
        "",
        f"{'cell':<{width}}{'steps':>7}  " + "".join(f"{f'seed {seed}':<13}" for seed in study.seeds),
    ]
    for cell in study.cells:
        states = [
            job.entry["status"]
            for seed in study.seeds
            for job in record.runs
            if job.slug == cell.slug and job.entry["seed"] == seed
        ]
        lines.append(f"{cell.name:<{width}}{steps[cell.slug]:>7}  " + "".join(f"{state:<13}" for state in states))
    counts = collections.Counter(job.entry["status"] for job in record.runs)
    lines += [
        "",
        f"now to run: {len(todo)} of {len(record.runs)} ({_counted(counts)}), {reason or f'{jobs} at a time'}",
    ]
    if jobs > 1:
        short = {
            timing_config(cell.configs[study.seeds[0]], steps[cell.slug]).training["max_steps"] for cell in study.cells
        }
        lines.append(f"then a timing pass of each cell, alone on the device: {_span(short)} steps")
    lines.append(_estimate(record, todo, steps, jobs))
    return "\n".join(line.rstrip() for line in lines)


def _estimate(record: Record, todo: Sequence[Job], steps: dict[str, int], jobs: int) -> str:
    done = [job.entry for job in record.runs if job.entry["status"] == FINISHED and job.entry["wall_seconds"]]
    remaining = sum(steps[job.slug] for job in todo)
    if not remaining:
        return "nothing is left to train"
    if not done:
        return "no estimate of the time: no run of this study has finished here yet"
    rate = sum(entry["wall_seconds"] for entry in done) / max(sum(entry["steps"] for entry in done), 1)
    return (
        f"about {_duration(rate * remaining / jobs)}, from {len(done)} finished runs: {rate:.2g} s for each of "
        f"{remaining} steps, loading and evaluation in it" + (f", shared by {jobs} jobs" if jobs > 1 else "")
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _counted(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def _span(values: set[int]) -> str:
    low, high = min(values), max(values)
    return show_value(low) if low == high else f"{low} to {high}"
