"""The record of a study on disk: its runs, the status of each, and the file ``study.json``."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from galore_trainer.errors import OptionError
from galore_trainer.run.files import write_json
from galore_trainer.run.results.result import RESULT
from galore_trainer.run.results.shapes import check_result, check_study
from galore_trainer.run.settings.methods import ADAPTER
from galore_trainer.run.settings.run_config import RESOLVED_CONFIG, RunConfig, load_run_config
from galore_trainer.run.study.grid import Cell, Study, comparable

STUDY_FILE, TIMING = "study.json", "timing"
FINISHED, FAILED, INTERRUPTED, RUNNING, WAITING = "finished", "failed", "interrupted", "running", "waiting"
TIMING_STEPS = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a study: a cell with one seed, or a cell's timing pass.

    Attributes:
        name: of the cell and the seed, for people.
        slug: of the cell.
        config: the run, its folder included.
        entry: its record in ``study.json``, changed as the run goes on.
    """

    name: str
    slug: str
    config: RunConfig
    entry: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The run's folder; its configuration and its log stand beside it."""
        return Path(self.config.output_dir)


class Record:
    """A study's folder and its ``study.json``: what was planned, what became of each run.

    Args:
        study: what is to be run.
        output: the folder; nothing is written before ``save``.

    Raises:
        OptionError: the folder holds something else, or a run of these cells with other settings.
    """

    def __init__(self, study: Study, output: Path) -> None:
        self.study, self.output = study, output
        old = _read_record(study, output)
        self.commands: list[str] = old.get("commands") or []
        self._old_cells = {cell["slug"]: cell for cell in old.get("cells", [])}
        self.runs: list[Job] = []
        self.timings: list[Job] = []
        self._cells = [self._cell(cell) for cell in study.cells]
        slugs = {cell["slug"] for cell in self._cells}
        earlier = [{**cell, "runs": _started(cell["runs"])} for cell in self._old_cells.values()]
        self._cells += [cell for cell in earlier if cell["slug"] not in slugs and cell["runs"]]
        order = {seed: i for i, seed in enumerate(study.seeds)}
        self.runs.sort(key=lambda job: order[job.entry["seed"]])  # every cell once before any a second time

    def save(self) -> None:
        """Write ``study.json``."""
        study = self.study
        content = {
            "name": study.name,
            "title": study.title,
            "question": study.question,
            "base": study.base,
            "metrics": study.metrics,
            "commands": self.commands,
            "cells": self._cells,
        }
        write_json(self.output / STUDY_FILE, content)

    def to_time(self) -> list[Job]:
        """The timing passes still to do: of every cell that finished, once any run's own times were not exclusive."""
        runs = [entry for cell in self._cells for entry in cell["runs"] if entry["status"] == FINISHED]
        if all(entry["exclusive"] for entry in runs):
            return []
        finished = {job.slug for job in self.runs if job.entry["status"] == FINISHED}
        return [job for job in self.timings if job.slug in finished and job.entry["status"] != FINISHED]

    def _cell(self, cell: Cell) -> dict[str, Any]:
        old = self._old_cells.get(cell.slug, {"runs": [], "timing": {}})
        by_seed = {entry["seed"]: entry for entry in old["runs"]}
        entries = []
        for seed, config in cell.configs.items():
            job = self._job(cell, f"seed-{seed}", config, {"seed": seed, **by_seed.pop(seed, {})})
            self.runs.append(job)
            entries.append(job.entry)
        first = next(iter(cell.configs.values()))
        timing = self._job(cell, TIMING, first, dict(old["timing"]))
        self.timings.append(timing)
        return {
            "name": cell.name,
            "slug": cell.slug,
            "values": cell.values,
            "runs": [*entries, *_started(by_seed.values())],
            "timing": timing.entry,
        }

    def _job(self, cell: Cell, leaf: str, config: RunConfig, entry: dict[str, Any]) -> Job:
        folder = f"{cell.slug}/{leaf}"
        entry = {"folder": folder, "status": WAITING, "exclusive": True, "wall_seconds": 0.0, "reason": None, **entry}
        job = Job(
            name=f"{cell.name}, {leaf.replace('-', ' ')}",
            slug=cell.slug,
            entry=entry,
            config=dataclasses.replace(config, output_dir=str(self.output / folder)),
        )
        if leaf != TIMING:
            _check_settings(job)
        result = read_result(job.folder)
        if result is not None:
            check_result(job.folder / RESULT, result)
            entry.update(status=FINISHED, reason=None, steps=result["steps"])
        elif entry["status"] != FAILED:
            entry["status"] = INTERRUPTED if (job.folder / RESOLVED_CONFIG).is_file() else WAITING
        return job


def timing_config(config: RunConfig, steps: int) -> RunConfig:
    """A short run of the same steps, without evaluation and saving: two refresh gaps, one where that is long."""
    gap = config.galore.update_proj_gap
    short = {
        "max_steps": min(steps, 2 * gap if 2 * gap <= TIMING_STEPS else gap),
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "push_to_hub": False,
    }
    return dataclasses.replace(
        config,
        training={**config.training, **short},
        galore=dataclasses.replace(config.galore, diagnose_refreshes=0),
        eval=dataclasses.replace(config.eval, before=False, also={}, limit=1, max_new_tokens=1),
    )


def read_result(folder: Path) -> dict[str, Any] | None:
    """The ``result.json`` of a finished run; None where there is none that can be read."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) else None


def remove_weights(folder: Path) -> None:
    """Remove the trained model and the checkpoints of a finished run; its results stay."""
    for path in [folder / "model", folder / ADAPTER, *folder.glob("checkpoint-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _check_settings(job: Job) -> None:
    """Raise ``OptionError`` where the run's folder holds a run of other settings."""
    saved = job.folder / RESOLVED_CONFIG
    if not saved.is_file():
        return
    old, new = comparable(load_run_config(saved)), comparable(job.config)
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if differing:
        key = differing[0]
        more = f" and {len(differing) - 1} more settings" if len(differing) > 1 else ""
        raise OptionError(
            "--output-dir",
            str(job.folder.parents[1]),
            "a folder without runs of other settings",
            f"{job.entry['folder']} was run with {key}={old.get(key)!r}, this study says {new.get(key)!r}{more}: "
            "give another --output-dir, or remove that folder.",
        )


def _started(entries: Any) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["status"] != WAITING]


def _read_record(study: Study, output: Path) -> dict[str, Any]:
    if output.exists() and not output.is_dir():
        raise OptionError("--output-dir", str(output), "a folder", "A file of this name exists: choose another.")
    path = output / STUDY_FILE
    if not path.is_file():
        if output.is_dir() and any(file for file in output.iterdir() if file.suffix != ".lock"):
            raise OptionError("--output-dir", str(output), "an empty or new folder, or one of this study")
        return {}
    record = read_study_file(path)
    if record["name"] != study.name:
        way_out = f"It holds the study {record['name']!r}: give another one."
        raise OptionError("--output-dir", str(output), f"a folder of the study {study.name!r}", way_out)
    return record


def read_study_file(path: Path) -> dict[str, Any]:
    """The content of a ``study.json``; ``OptionError`` for one that cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict):
            check_study(path, record)
            return record
        problem = "it is no record of a study"
    except OptionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    raise OptionError(str(path), problem, f"the {STUDY_FILE} that galore-ft ablate writes")
