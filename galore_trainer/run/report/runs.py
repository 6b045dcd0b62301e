"""The runs of a report, read from their folders and grouped into cells; the runs of a cell differ in the seed alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from galore_trainer.errors import OptionError
from galore_trainer.metrics.answers import wilson_interval
from galore_trainer.run.results.columns import Column, Result
from galore_trainer.run.results.result import LOG, RESULT
from galore_trainer.run.results.shapes import LARGEST, check_result, read_log
from galore_trainer.run.settings.methods import methods_reading
from galore_trainer.run.settings.run_config import RESOLVED_CONFIG
from galore_trainer.run.study.grid import comparable, short_names, show_value
from galore_trainer.run.study.record import FAILED, FINISHED, STUDY_FILE, TIMING, read_result, read_study_file

ABSENT = object()
# Settings that change nothing of what a run computes.
NEUTRAL = {
    "seed",
    "run_name",
    "report_to",
    "disable_tqdm",
    "logging_steps",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "eval.samples",
    "eval.samples_steps",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        folder: of the run.
        result: its ``result.json``.
        log: rows of its ``log.jsonl``, one a step.
        samples: what the model answered during training: rows with ``id``, ``prompt``, ``prediction``, by step.
    """

    folder: Path
    result: Result
    log: tuple[Mapping[str, Any], ...]
    samples: Mapping[int, Sequence[Mapping[str, str]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one cell.

    Attributes:
        name: for people.
        values: what tells the cell from the others, by dotted key.
        runs: the finished ones, one a seed.
        timing: the result that times are taken from instead of the runs' own; empty if that pass is missing.
        failures: reason by seed.
    """

    name: str
    values: Mapping[str, Any]
    runs: tuple[Run, ...]
    timing: Result = dataclasses.field(default_factory=dict)
    failures: Mapping[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """The content of a report.

    Attributes:
        title, question: of the study, or of the comparison.
        task: of all runs.
        groups: in the order of the tables; at least one has a finished run.
        metrics: columns to show first.
        exclusive_pass: times come from ``Group.timing``, as the runs shared their device.
        commands: what made the runs.
    """

    title: str
    question: str
    task: str
    groups: tuple[Group, ...]
    metrics: tuple[str, ...]
    exclusive_pass: bool
    commands: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """All finished runs."""
        return [run for group in self.groups for run in group.runs]


def gather(folders: Sequence[str | Path]) -> ReportData:
    """Read the folder of one study, or the folders of runs.

    Raises:
        OptionError: no runs, a folder without any, unfinished runs, runs of different tasks.
    """
    paths = list(dict.fromkeys(Path(folder).expanduser() for folder in folders))
    studies = [path for path in paths if (path / STUDY_FILE).is_file()]
    if not paths or (studies and len(paths) > 1):
        raise OptionError("RUNS", [str(path) for path in paths], "folders of runs, or the folder of one study")
    return _study(studies[0]) if studies else _comparison(paths)


def settings(run: Run) -> dict[str, Any]:
    """The settings that matter to a run, by dotted key, without its seed and what its method does not read."""
    return {
        key: value
        for key, value in comparable(run.result["config"]).items()
        if key not in NEUTRAL and _reads(run.result["method"], key)
    }


def differing(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The settings to which cells give different values, with each cell's; ``ABSENT`` where it has none."""
    by_cell = [settings(group.runs[0]) for group in groups if group.runs]
    keys = dict.fromkeys(key for chosen in by_cell for key in chosen)
    columns = {key: [chosen.get(key, ABSENT) for chosen in by_cell] for key in keys}
    return {key: values for key, values in columns.items() if len({_key(v) for v in values if v is not ABSENT}) > 1}


def common(runs: Sequence[Run]) -> dict[str, Any]:
    """The settings to which all runs that have them give one value, nested as in YAML."""
    by_run = [settings(run) for run in runs]
    nested: dict[str, Any] = {}
    for key in dict.fromkeys(key for chosen in by_run for key in chosen):
        values = [chosen[key] for chosen in by_run if key in chosen]
        if all(value == values[0] for value in values):
            block, _, name = key.rpartition(".")
            (nested.setdefault(block, {}) if block else nested)[name] = values[0]
    return nested


def cell_values(data: ReportData, group: Group, column: Column) -> list[float]:
    """A column's figures of one cell, one a seed; a single one where times come from the timing pass."""
    if column.group == "time" and data.exclusive_pass:
        runs = group.runs[:1]
        values = [column.read(run.result, group.timing) for run in runs]
    else:
        values = [column.read(run.result, run.result) for run in group.runs]
    return [value for value in values if value is not None]


def score_interval(group: Group) -> tuple[float, float] | None:
    """The 95 % interval of a cell's mean score on its evaluation problems; None for a score that is no share."""
    scores = [score for run in group.runs if (score := run.result["score_after"]) and score.get("interval")]
    if not scores:
        return None
    if len(scores) == 1:
        low, high = scores[0]["interval"]
        return low, high
    problems = scores[0]["n"]
    return wilson_interval(round(sum(score["score"] for score in scores) / len(scores) * problems), problems)


# ------------------------------------------------------------------------------------------ a study


def _study(folder: Path) -> ReportData:
    record = read_study_file(folder / STUDY_FILE)
    commands = record.get("commands") or []
    groups, unfinished, shared = [], [], False
    for cell in record["cells"]:
        runs, failures = [], {}
        for entry in cell["runs"]:
            result = read_result(folder / entry["folder"])
            if result is not None:
                runs.append(_run(folder / entry["folder"], result))
                shared |= entry["status"] == FINISHED and not entry["exclusive"]
            elif entry["status"] == FAILED:
                failures[entry["seed"]] = entry["reason"] or "for no known reason"
            else:
                unfinished.append(entry["folder"])
        timing = read_result(folder / cell["slug"] / TIMING) or {}
        if timing:
            check_result(folder / cell["slug"] / TIMING / RESULT, timing)
        groups.append(
            Group(name=cell["name"], values=cell["values"], runs=tuple(runs), timing=timing, failures=failures)
        )
    if unfinished:
        again = next(iter(commands[-1:]), "galore-ft ablate")
        raise OptionError(
            "RUNS",
            unfinished,
            "finished runs alone",
            f"Finish them with `{again}`, or report on finished ones: galore-ft report {folder}/CELL/seed-*.",
        )
    results = [run.result for group in groups for run in group.runs]
    if not results:
        reasons = dict.fromkeys(reason for group in groups for reason in group.failures.values())
        raise OptionError("RUNS", str(folder), "at least one finished run", " ".join(reasons))
    return ReportData(
        title=record.get("title") or record["name"],
        question=record.get("question") or "",
        task=_task({group.name: group.runs for group in groups}),
        groups=tuple(groups),
        metrics=tuple(record.get("metrics") or ()),
        exclusive_pass=shared,
        commands=tuple(commands),
    )


# ------------------------------------------------------------------------------------------ any runs


def _comparison(folders: Sequence[Path]) -> ReportData:
    runs, unfinished = [], []
    for folder in folders:
        result = read_result(folder)
        if result is not None:
            runs.append(_run(folder, result))
        elif (folder / RESULT).exists():
            raise OptionError("RUNS", str(folder / RESULT), "JSON with a run's results", "It cannot be read.")
        elif (folder / RESOLVED_CONFIG).is_file():
            unfinished.append(str(folder))
        else:
            inside = sorted(str(path.parent) for path in folder.glob("*/result.json"))
            hint = f"Name the runs in it: galore-ft report {' '.join(inside[:3])} ..." if inside else ""
            raise OptionError("RUNS", str(folder), "a run's folder (with result.json) or a study's (study.json)", hint)
    if unfinished:
        way_out = "Finish them with galore-ft train ... --resume auto, or leave them out."
        raise OptionError("RUNS", unfinished, "finished runs alone", way_out)
    task = _task({str(run.folder): [run] for run in runs})
    unset = _training_defaults(runs)
    by_settings: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        by_settings.setdefault(
            tuple((key, _key(value)) for key, value in sorted({**unset, **settings(run)}.items())), []
        ).append(run)
    groups = [Group(name="", values={}, runs=tuple(members)) for members in by_settings.values()]
    named = _name(groups)
    commands = tuple(f"galore-ft train {run.folder}/{RESOLVED_CONFIG} --output-dir NEW" for run in runs)
    return ReportData(
        title="Comparison" if len(named) > 1 else f"{runs[0].result['method']} on {task}",
        question="",
        task=task,
        groups=tuple(named),
        metrics=("score", "eval_loss", "fine_tuning_seconds", "peak_memory", "state_bytes"),
        exclusive_pass=False,
        commands=commands,
    )


def _name(groups: Sequence[Group]) -> list[Group]:
    """Name cells by as few of the differing settings as tell them apart, the method first."""
    columns = differing(groups)
    keys: list[str] = []
    for key in sorted(columns, key=lambda key: (key != "method", -len(set(map(_key, columns[key]))))):
        if len({tuple(_key(columns[k][i]) for k in keys) for i in range(len(groups))}) == len(groups):
            break
        keys.append(key)
    short = short_names(keys)
    named = []
    for i, group in enumerate(groups):
        values = {key: columns[key][i] for key in keys if columns[key][i] is not ABSENT}
        words = [show_value(v) if k == "method" else f"{short[k]} {show_value(v)}" for k, v in values.items()]
        name = ", ".join(words) or group.runs[0].result["method"]
        named.append(dataclasses.replace(group, name=name, values=values))
    for name in {group.name for group in named if [other.name for other in named].count(group.name) > 1}:
        named = [
            dataclasses.replace(group, name=f"{name} ({group.runs[0].folder.name})") if group.name == name else group
            for group in named
        ]
    numeric = all(is_number(value) for group in named for value in group.values.values())
    return sorted(named, key=lambda group: tuple(group.values.values())) if numeric else named


def is_number(value: Any) -> bool:
    """Whether a setting's value can be put on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _training_defaults(runs: Sequence[Run]) -> dict[str, Any]:
    """What transformers takes for fields that some runs set and others leave to it."""
    by_run = [settings(run) for run in runs]
    partly = {
        key for chosen in by_run for key in chosen if "." not in key and not all(key in other for other in by_run)
    }
    if not partly:
        return {}
    from transformers import TrainingArguments

    plain = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    return {key: plain[key] for key in partly if plain.get(key, dataclasses.MISSING) is not dataclasses.MISSING}


def _key(value: Any) -> str:
    """A text that is the same for equal values: 10 and 10.0 are one."""
    return repr(float(value) if is_number(value) else value)


def _run(folder: Path, result: dict[str, Any]) -> Run:
    check_result(folder / RESULT, result)
    rows: dict[tuple[int, bool], Mapping[str, Any]] = {}
    samples: dict[int, Sequence[Mapping[str, str]]] = {}
    for row in read_log(folder / LOG):  # a resumed run repeats the steps after its checkpoint
        if "samples" in row:
            samples[row["step"]] = row["samples"]
        else:
            rows[row["step"], "loss" in row] = row
    return Run(folder=folder, result=result, log=tuple(rows.values()), samples=samples)


def _task(named: Mapping[str, Iterable[Run]]) -> str:
    tasks: dict[str, list[str]] = {}
    for name, runs in named.items():
        for run in runs:
            tasks.setdefault(run.result["task"], []).append(name)
    if len(tasks) > 1:
        raise OptionError("RUNS", tasks, "runs of one task", "Their scores do not compare: write a report for each.")
    return next(iter(tasks))


def _reads(method: str, key: str) -> bool:
    readers = methods_reading(key)
    return not readers or method in readers
