"""Run one randomly chosen run of each study again, and compare.

    python benchmarks/rerun.py results/*/study.jsonl --seed 1 --jobs 4 --folder runs/rerun

A run has the settings that its study recorded, file names included. Its loss is compared with the recorded one: the
difference, its 95 % interval over problems, and whether it lies within the noise of one run, ``--noise``: half the
95 % interval about the difference of two runs that differ in the seed alone. The table is printed as Markdown; with
``--lines``, the results are appended to a file, a line each.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paired import Run, by_problem
from study_lines import LOSSES, read_lines, read_rows

from galore_trainer.run.files import write_file
from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.study.record import read_result

NOISE = 0.0028  # of GSM8K, from results/gsm8k_seeds
TITLES = ("study", "run", "recorded loss", "loss again", "difference, by problem", "within")


def choose(file: Path, seed: int) -> dict[str, Any]:
    """A run with a loss; timing passes and runs of an earlier study are not chosen."""
    lines = [line for line in read_lines(file)[1] if line["losses"] and not line["timing"]]
    own = [line for line in lines if "taken_from" not in line["result"]]
    return random.Random(f"{seed} {file.parent.name}").choice(own or lines)


def write_settings(line: dict[str, Any], folder: Path) -> None:
    """Write the settings of a line beside its folder."""
    write_file(folder.with_suffix(".yaml"), RunConfig.from_dict(line["result"]["config"]).to_yaml())


def again(line: dict[str, Any], folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train and score with these settings; returns the new ``result.json``, and the losses of its examples."""
    words = ["train", str(folder.with_suffix(".yaml")), f"output_dir={folder}", *overrides]
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    code = start(words, log)
    result = read_result(folder)
    if code or result is None:
        raise SystemExit(f"{line['folder']} ended with {code}; see {log}")
    rows = read_rows(folder / LOSSES)
    return {"result": result, "losses": [[row["loss"], row["tokens"]] for row in rows]}


def start(words: Sequence[str], log: Path) -> int:
    """``galore-ft`` with these words, in a process whose output goes into a file; returns its exit code."""
    with log.open("w", encoding="utf-8") as out:
        return subprocess.run([sys.executable, "-m", "galore_trainer.cli", *words], stdout=out, stderr=out).returncode


def compare(file: Path, line: dict[str, Any], new: dict[str, Any], noise: float) -> dict[str, Any]:
    """The figures of a row."""
    ours, theirs = (
        Run(x["result"]["score_after"]["eval_loss"], [(loss, n) for loss, n in x["losses"]], 0.0) for x in (new, line)
    )
    gap = by_problem({0: ours}, {0: theirs})
    environment = new["result"]["environment"]
    return {
        "study": file.parent.name,
        "run": line["folder"],
        "recorded": theirs.loss,
        "again": ours.loss,
        "difference": gap._asdict(),
        "within": abs(gap.mean) <= noise,
        "commits": [line["result"]["environment"]["commit"], environment["commit"]],
        "device": environment["device"],
        "versions": environment["versions"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| " + " | ".join(TITLES) + " |", "| --- | --- | ---: | ---: | --- | --- |"]
    for row in rows:
        gap = row["difference"]
        cells = (
            row["study"],
            row["run"],
            f"{row['recorded']:.4f}",
            f"{row['again']:.4f}",
            f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]",
            "yes" if row["within"] else "**no**",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="of study_lines.py, and key=value settings for every run")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side on one device")
    parser.add_argument("--folder", type=Path, default=Path("runs/rerun"))
    parser.add_argument("--noise", type=float, default=NOISE)
    parser.add_argument("--lines", type=Path)
    arguments = parser.parse_args()
    overrides = [word for word in arguments.files if "=" in word]
    chosen = {Path(word): choose(Path(word), arguments.seed) for word in arguments.files if "=" not in word}

    for file, line in chosen.items():  # transformers cannot be imported by several threads at once
        write_settings(line, arguments.folder / file.parent.name)

    def run(file: Path) -> dict[str, Any]:
        line = chosen[file]
        return compare(file, line, again(line, arguments.folder / file.parent.name, overrides), arguments.noise)

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(run, chosen))
    if arguments.lines:
        before = arguments.lines.read_text(encoding="utf-8") if arguments.lines.is_file() else ""
        write_file(arguments.lines, before + "".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows))


if __name__ == "__main__":
    main()
