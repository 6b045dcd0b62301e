"""A study as one file of JSON lines: to commit it, to go on with it on another machine, to report on it.

    python benchmarks/study_lines.py unpack results/gsm8k_rates/study.jsonl runs/ablate-gsm8k_rates
    galore-ft ablate gsm8k_rates data.source=path/to/train.jsonl --jobs 8 --max-cells 16 --no-timing
    python benchmarks/study_lines.py pack runs/ablate-gsm8k_rates results/gsm8k_rates/study.jsonl

The first line holds ``study.json``, the ids of the held-out examples and, where it was given, the package's commit in
runs that name none; every other line is a finished run: its ``result.json`` without the errors of single matrices, the
loss and the tokens of each example, and whether its answer was correct, where answers were written. After ``unpack``,
``galore-ft ablate`` with the same output folder skips these runs, and ``galore-ft report`` makes tables of them. Logs,
texts of predictions and weights stay behind.

    python benchmarks/study_lines.py borrow results/gsm8k_seeds/study.jsonl runs/ablate-gsm8k_rank \
        --study benchmarks/studies/gsm8k_rank.yaml data.source=path/to/train.jsonl
    python benchmarks/study_lines.py rescore runs/ablate-e2e

``borrow`` takes over the runs that a study has in common with another one: those of equal settings and seed, under the
words that ``galore-ft ablate`` gets. ``rescore`` scores the predictions of texts again where a metric was skipped, for
want of Java or of a package.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from galore_trainer.run.files import write_file, write_json
from galore_trainer.run.results.result import RESULT
from galore_trainer.run.scoring.score import score_files
from galore_trainer.run.settings.run_config import RESOLVED_CONFIG, RunConfig
from galore_trainer.run.study.grid import Study, comparable, load_study
from galore_trainer.run.study.record import FINISHED, STUDY_FILE, Record, read_result, read_study_file

LOSSES, PREDICTIONS = "losses.jsonl", "predictions.jsonl"
LEFT_OUT = ("by_matrix",)


def pack(folder: Path, file: Path, commit: str | None = None) -> int:
    """Write the finished runs of a study's folder into a file; returns their number.

    ``commit`` is the package's, for runs from a copy of it that knows none.
    """
    record = read_study_file(folder / STUDY_FILE)
    ids: list[str] | None = None
    lines = []
    for cell in record["cells"]:
        for entry in [*cell["runs"], cell["timing"]]:
            result = read_result(folder / entry["folder"]) if entry else None
            if result is None:
                continue
            if error := result.get("projection_error"):
                result["projection_error"] = {key: value for key, value in error.items() if key not in LEFT_OUT}
            examples = read_rows(folder / entry["folder"] / LOSSES)
            names = [example["id"] for example in examples]
            if names and ids is not None and names != ids:
                raise SystemExit(f"{entry['folder']} was scored on other examples than the runs before it")
            ids = ids or names or None
            losses = [[example["loss"], example["tokens"]] for example in examples]
            line = {"cell": cell["name"], "folder": entry["folder"], "timing": entry is cell["timing"]}
            lines.append({**line, "result": result, "losses": losses})
            rows = read_rows(folder / entry["folder"] / PREDICTIONS)
            answers: dict[str, Any] = {row["id"]: row.get("correct") for row in rows}
            correct = [answers.get(name) for name in names]
            if correct and None not in correct:
                lines[-1]["correct"] = list(map(int, correct))
    head = {**({"commit": commit} if commit else {}), "study": record, "examples": ids or []}
    write_file(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (head, *lines)))
    return len(lines)


def unpack(file: Path, folder: Path) -> int:
    """Write the folder of a study from a file, if there is one, beside what the folder holds; returns the runs."""
    if not file.is_file():
        return 0
    head, lines = read_lines(file)
    for line in lines:
        if read_result(folder / line["folder"]) is None:
            _write_run(folder / line["folder"], head, line)
    if not (folder / STUDY_FILE).is_file():
        write_json(folder / STUDY_FILE, head["study"])
    return len(lines)


def borrow(file: Path, folder: Path, study: Study) -> int:
    """Write the runs of a file that are runs of ``study`` too into its folder; returns the new ones.

    Their ``result.json`` says under ``taken_from`` of which study they are, and of which commit of the package.
    """
    head, lines = read_lines(file)
    runs = {_settings(RunConfig.from_dict(line["result"]["config"])): line for line in lines if not line["timing"]}
    shared = {entry["folder"] for cell in head["study"]["cells"] for entry in cell["runs"] if not entry["exclusive"]}
    record, taken = Record(study, folder), 0
    for job in record.runs:
        line = runs.get(_settings(job.config))
        if line is None or job.entry["status"] == FINISHED:
            continue
        line["result"].setdefault("taken_from", {"study": head["study"]["name"], "commit": head.get("commit")})
        _write_run(job.folder, head, line)
        exclusive = line["folder"] not in shared
        job.entry.update(status=FINISHED, exclusive=exclusive, steps=line["result"]["steps"])
        taken += 1
    record.save()
    return taken


def _settings(config: RunConfig) -> str:
    return json.dumps(comparable(config), sort_keys=True)


def _write_run(place: Path, head: dict[str, Any], line: dict[str, Any]) -> None:
    """The files of a finished run, from its line."""
    examples = [
        {"id": name, "loss": loss, "tokens": tokens}
        for name, (loss, tokens) in zip(head["examples"], line["losses"], strict=False)
    ]
    write_rows(place / LOSSES, examples)
    if "correct" in line:
        answers = zip(head["examples"], line["correct"], strict=True)
        write_rows(place / PREDICTIONS, [{"id": name, "correct": bool(correct)} for name, correct in answers])
    write_file(place / RESOLVED_CONFIG, RunConfig.from_dict(line["result"]["config"]).to_yaml())
    write_json(place / RESULT, line["result"])


def rescore(folder: Path) -> int:
    """Score the predictions of texts again in each run of a study that skipped a metric; returns their number."""
    changed = 0
    for path in sorted(folder.glob(f"*/seed-*/{PREDICTIONS}")):
        result = read_result(path.parent)
        if result is None or None not in (result["score_after"].get("meteor"), result["score_after"].get("rouge1")):
            continue
        scores = score_files("e2e", str(path), str(path))
        del scores["task"]
        result["score_after"] |= scores
        write_json(path.parent / RESULT, result)
        changed += 1
    return changed


def read_lines(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line of a file, and its runs; one that names no commit gets the file's."""
    head, *lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    for line in lines:
        environment = line["result"]["environment"]
        environment["commit"] = environment.get("commit") or head.get("commit")
    return head, lines


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of a run; none where there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a file of JSON lines."""
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=("pack", "unpack", "borrow", "rescore"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for galore-ft ablate (borrow)")
    parser.add_argument("--study", help="that borrows: a name or a YAML file, as for galore-ft ablate")
    parser.add_argument("--commit", help="of the package, where runs came from a copy of it that knows none (pack)")
    arguments = parser.parse_intermixed_args()
    if arguments.way == "rescore":
        print(f"{rescore(arguments.source)} runs scored again")
        return
    if arguments.target is None or (arguments.way == "borrow" and not arguments.study):
        parser.error("borrow wants a file, a folder and --study; pack and unpack want a file and a folder")
    if arguments.way == "borrow":
        runs = borrow(arguments.source, arguments.target, load_study(arguments.study, arguments.overrides))
    elif arguments.way == "pack":
        runs = pack(arguments.source, arguments.target, arguments.commit)
    else:
        runs = unpack(arguments.source, arguments.target)
    print(f"{runs} runs, {arguments.source} to {arguments.target}")


if __name__ == "__main__":
    main()
