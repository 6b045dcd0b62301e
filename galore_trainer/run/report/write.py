"""``report``: tables and plots of finished runs, as Markdown, as one HTML page, and as PNG files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from galore_trainer.run.files import check_writable, write_file
from galore_trainer.run.report.pages import Block, Bullets, Code, Heading, Plot, Table, Text, to_html, to_markdown
from galore_trainer.run.report.plots import make_plots
from galore_trainer.run.report.runs import (
    ABSENT,
    Group,
    ReportData,
    cell_values,
    common,
    differing,
    gather,
    score_interval,
)
from galore_trainer.run.results.columns import LOSS_ON, Column, columns, timed_steps
from galore_trainer.run.settings.yaml_io import dump
from galore_trainer.run.study.grid import show_value
from galore_trainer.run.study.record import TIMING

UNTIMED = "no exclusive timing pass has finished"
SECTIONS = {
    "quality": "Scores and losses",
    "time": "Time",
    "memory": "Memory",
    "projection": "Projection",
}


def report(folders: Sequence[str | Path], output: Path, *, title: str | None = None, command: str = "") -> list[Path]:
    """Write ``report.md``, ``report.html``, the plots' PNG files, and the figures of every run as ``runs.jsonl``.

    Args:
        folders: of finished runs, or of one study.
        output: where to write; older reports there are replaced.
        title: in place of the study's.
        command: that asked for the report.

    Returns:
        The files written, the page for reading first.

    Raises:
        OptionError: what ``runs.gather`` refuses, or a folder that cannot be written; nothing was written.
    """
    data = gather(folders)
    check_writable("--output-dir", output / "report.html")
    title = title or data.title
    plots = make_plots(data)
    blocks = list(compose(data, plots, [command] if command else []))
    files: dict[str, str | bytes] = {
        "report.html": to_html(title, blocks),
        "report.md": to_markdown(title, blocks),
        **{f"{plot.name}.png": plot.png for plot in plots.values()},
        "runs.jsonl": "".join(json.dumps(figures, ensure_ascii=False) + "\n" for figures in _figures(data)),
    }
    for name, content in files.items():
        write_file(output / name, content)
    return [output / name for name in files]


def _figures(data: ReportData) -> Iterator[dict[str, Any]]:
    """What the tables were made of: each run's figures, those of a timing pass as the run ``timing``."""
    for group in data.groups:
        for name, result in [*((run.folder.name, run.result) for run in group.runs), (TIMING, group.timing)]:
            kept = {key: value for key, value in result.items() if key not in ("config", "data_notes")}
            if error := kept.get("projection_error"):
                kept["projection_error"] = {key: value for key, value in error.items() if key != "by_matrix"}
            if kept:
                yield {"cell": group.name, "run": name, **kept}


def compose(data: ReportData, plots: dict[str, Plot], commands: Sequence[str] = ()) -> Iterator[Block]:
    """The parts of a report, in order."""
    table = columns(run.result for run in data.runs)
    if data.question:
        yield Text(data.question)
    yield Text(_summary(data))
    yield Heading("Result")
    first = [key for key in data.metrics if key in table]
    first += [key for key in table if key.startswith(LOSS_ON) and key not in first]
    yield _table(data, [table[key] for key in first], reasons=True)
    yield Bullets(list(_how_to_read(data)))
    for group, heading in SECTIONS.items():
        chosen = [column for column in table.values() if column.group == group]
        yield Heading(heading)
        if group in plots:
            yield plots[group]
        yield _table(data, chosen, interval=group == "quality")
        if notes := list(_notes(data, chosen)):
            yield Bullets(notes)
        if group == "quality" and "loss" in plots:
            yield plots["loss"]
            yield from _samples(data)
    yield Heading("Settings")
    if differences := _differences(data):
        yield differences
    yield Code(without_places(dump(common(data.runs))), "What the runs have in common")
    yield Heading("Versions and commands")
    yield Bullets(list(_environment(data)))
    if lines := [without_places(text) for text in (*data.commands, *commands)]:
        yield Code("\n".join(lines))


def without_places(text: str) -> str:
    """A text without the folders of this machine: ``/home/me/data/train.json`` becomes ``path/to/train.json``."""
    return re.sub(r"(?<![\w.~/:-])~?/(?:[^\s/'\"]+/)*([^\s/'\"]+)", r"path/to/\1", text)


# ------------------------------------------------------------------------------------------ the parts


def _samples(data: ReportData) -> Iterator[Block]:
    """What the first run of each cell answered during training, prompt by prompt and step by step."""
    for group in data.groups:
        run = next((run for run in group.runs if run.samples), None)
        if run is None:
            continue
        answers: dict[tuple[str, str], list[str]] = {}
        for step, rows in sorted(run.samples.items()):
            for row in rows:
                answers.setdefault((row["id"], row["prompt"]), []).append(f"step {step}: {row['prediction']}")
        texts = ["\n".join([f"{name}\n{prompt}", *lines]) for (name, prompt), lines in answers.items()]
        yield Code(without_places("\n\n".join(texts)), f"Samples during training, {group.name}")


def _table(data: ReportData, chosen: Sequence[Column], *, interval: bool = False, reasons: bool = False) -> Table:
    """One row for each cell, and one for its failures.

    Args:
        interval: put the score's interval, and what it was scored on, behind the score, which comes first.
        reasons: say why a run failed, not only that.
    """
    timed = data.exclusive_pass and all(column.group == "time" for column in chosen)
    titles = [_title(data, column) for column in chosen]
    if interval:
        titles[1:1] = ["95 % interval, %", "examples"]
    rows = []
    for group in data.groups:
        if group.runs:
            results = [group.timing] if timed and group.timing else [run.result for run in group.runs]
            first = [group.name, str(len(results)), ", ".join(str(result["seed"]) for result in results)]
            cells = [column.show(cell_values(data, group, column)) for column in chosen]
            if interval:
                cells[1:1] = _interval(group)
            rows.append([*first, *cells])
        if group.failures:
            reason = f"failed: {'; '.join(dict.fromkeys(group.failures.values()))}" if reasons else "failed"
            rows.append([group.name, str(len(group.failures)), ", ".join(map(str, group.failures)), reason])
    return Table(["", "n", "seeds", *titles], rows)


def _title(data: ReportData, column: Column) -> str:
    suffix = " (exclusive pass)" if column.group == "time" and data.exclusive_pass else ""
    return f"{column.title}{suffix}"


def _interval(group: Group) -> list[str]:
    """The score's interval, and on how many examples it was scored."""
    interval = score_interval(group)
    shown = "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
    counts = {run.result["score_after"]["n"] for run in group.runs if run.result["score_after"]}
    return [shown, " or ".join(map(str, sorted(counts))) or "-"]


def _summary(data: ReportData) -> str:
    results = [run.result for run in data.runs]
    steps = sorted({result["steps"] for result in results})
    scored = sorted({result["score_after"]["n"] for result in results if result["score_after"]})
    failed = sum(len(group.failures) for group in data.groups)
    words = [
        f"{len(results)} finished runs in {len(data.groups)} cells" + (f", {failed} failed" if failed else ""),
        f"task {data.task}" + (f", scored on {' or '.join(map(str, scored))} held-out examples" if scored else ""),
        f"{steps[0]} steps each" if len(steps) == 1 else f"{steps[0]} to {steps[-1]} steps",
        f"on {_joined(result['environment']['device'] for result in results)}",
    ]
    return "; ".join(words) + "."


def _how_to_read(data: ReportData) -> Iterator[str]:
    if any(len(group.runs) > 1 for group in data.groups):
        yield "mean ± standard deviation over the seeds"
    yield "eval loss: cross entropy on the held-out targets after training"
    if data.exclusive_pass and not any(group.timing for group in data.groups):
        yield "no times: the runs shared their device, and no timing pass of the cells was made"
    elif data.exclusive_pass:
        yield (
            "times: the runs shared their device, so each cell was timed once more, alone and without evaluation: the "
            "exclusive pass, s per step; fine-tuning is that figure times the run's steps"
        )
    else:
        yield "fine-tuning: all steps with refreshes, without evaluation and saving"


def _notes(data: ReportData, chosen: Iterable[Column]) -> Iterator[str]:
    titles_by_gap: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for column in chosen:
        by_reason: dict[str, list[str]] = {}
        for group in [g for g in data.groups if g.runs and not cell_values(data, g, column)]:
            untimed = column.group == "time" and data.exclusive_pass and not group.timing
            by_reason.setdefault(UNTIMED if untimed else column.missing, []).append(group.name)
        for reason, cells in by_reason.items():
            titles_by_gap.setdefault((tuple(cells), reason), []).append(column.title)
    for (absent, reason), titles in titles_by_gap.items():
        where = "any cell" if len(absent) == sum(bool(g.runs) for g in data.groups) else _some(absent)
        yield f"no {' / '.join(titles)} for {where}" + (f": {reason}" if reason else "")
    groups = {column.group for column in chosen}
    if "quality" in groups and any(score_interval(group) for group in data.groups):
        yield "95 % interval: Wilson's, of the mean score, for the number of examples it was scored on"
    if "memory" in groups:
        yield f"peak memory: {_joined(run.result['peak_memory']['meaning'] for run in data.runs)}"
    if "projection" in groups and any(run.result.get("projection_error") for run in data.runs):
        yield "projection error: mean over matrices of |G - lift(project(G))| / |G| at the newest refresh"
        yield "excess: error / error of an exact SVD - 1, on the block that was decomposed"
        yield "sharing excess: error / error of one joint exact basis, on the whole weight"
    if "time" in groups and not data.exclusive_pass:
        resumed = [run for run in data.runs if timed_steps(run.result) != run.result["steps"]]
        if resumed:
            names = _some([without_places(str(run.folder)) for run in resumed])
            yield f"resumed, so that times are of the steps since, scaled to the whole: {names}"


def _differences(data: ReportData) -> Table | None:
    columns_ = differing(data.groups)
    shown = {key for group in data.groups for key in group.values}
    if not columns_.keys() - shown:
        return None
    names = [group.name for group in data.groups if group.runs]
    rows = [
        [name, *("-" if values[i] is ABSENT else without_places(show_value(values[i])) for values in columns_.values())]
        for i, name in enumerate(names)
    ]
    return Table(["", *columns_], rows)


def _environment(data: ReportData) -> Iterator[str]:
    places = [run.result["environment"] for run in data.runs]
    versions = [", ".join(f"{name} {version}" for name, version in place["versions"].items()) for place in places]
    commits = [
        (place["commit"] or "unknown (installed from a wheel)")
        + (", with uncommitted changes" if place["uncommitted_changes"] else "")
        for place in places
    ]
    yield f"versions: {_joined(versions, '; or ')}"
    yield f"commit: {_joined(commits)}"
    devices = [
        f"{place['device']}, {place['accelerators'] or 'no'} accelerator(s), {place['platform']}" for place in places
    ]
    yield f"device: {_joined(devices)}"
    if len(set(devices)) > 1:
        yield "the runs were made on different devices: times and memory do not compare"


def _joined(texts: Iterable[str], between: str = " or ") -> str:
    return between.join(dict.fromkeys(texts))


def _some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
