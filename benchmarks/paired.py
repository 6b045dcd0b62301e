"""Methods at their best learning rates, and the paired differences that decide between them.

    python benchmarks/paired.py results/gsm8k_rates/study.jsonl
    python benchmarks/paired.py results/gsm8k_seeds/study.jsonl --pair "GaLore+ r 128, scaled" "AdamW"

Takes a file of ``study_lines.py``. Cells that differ in the learning rate alone are one method. The first table has
every method's best rate by the mean eval loss over its seeds, says where that rate is the lowest or highest that was
tried, and what the search took. A pair is compared at the best rate of each, on the seeds and examples that both have:

- by seed: mean difference of eval loss, and its 95 % interval by Student's t over the seeds' differences;
- by problem: the same difference as a mean over problems weighed by their tokens, each problem's loss being its mean
  over the seeds; the 95 % interval is over problems and says nothing about other seeds.

Below 0 the first method of the pair is better.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from study_lines import read_lines

from galore_trainer.tables import TextTable

# 97.5 % quantiles of Student's t, by degrees of freedom from 1; above them the normal quantile is near enough
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
NORMAL = 1.960
RATE = re.compile(r"(^|, )learning_rate \S+$")  # what a study appends to the names of such cells

Losses = list[tuple[float, int]]  # of each example: nats per token, and tokens


class Run(NamedTuple):
    """A finished run; ``correct`` is 1 for each example whose answer was right, and empty where none was written."""

    loss: float
    losses: Losses
    seconds: float
    result: Mapping[str, Any] = {}
    correct: Sequence[int] = ()

    def answers(self) -> Losses:
        """Percent of right answers, an example each, all of one weight."""
        return [(100.0 * right, 1) for right in self.correct]


class Difference(NamedTuple):
    """A mean difference with its 95 % interval, over ``n`` pairs; the interval is infinite for a single pair."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """As a table shows it."""
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}], n {self.n}"


Runs = dict[str, dict[float, dict[int, Run]]]  # method -> rate -> seed -> run


def read(file: Path) -> Runs:
    """The runs of a file by method, rate and seed; timing passes are left out."""
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    for line in read_lines(file)[1]:
        result = line["result"]
        if line["timing"] or not result["score_after"]:
            continue
        losses = [(loss, tokens) for loss, tokens in line["losses"]]
        loss, seconds = result["score_after"]["eval_loss"], result["seconds"]["training"]
        run = Run(loss, losses, seconds, result, line.get("correct", []))
        runs[RATE.sub("", line["cell"])][result["learning_rate"]][result["seed"]] = run
    return runs


def best_rate(rates: dict[float, dict[int, Run]]) -> float:
    """The rate of the lowest mean loss over the seeds that every rate with the most seeds has."""
    most = max(len(seeds) for seeds in rates.values())
    whole = {rate: seeds for rate, seeds in rates.items() if len(seeds) == most}
    return min(whole, key=lambda rate: statistics.fmean(run.loss for run in whole[rate].values()))


def by_seed(
    first: dict[int, Run], second: dict[int, Run], figure: Callable[[Run], float] = lambda run: run.loss
) -> Difference:
    """The paired difference of a figure of each run, the loss if none is given, over the seeds of both."""
    differences = [figure(first[seed]) - figure(second[seed]) for seed in sorted(first.keys() & second.keys())]
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return Difference(mean, -math.inf, math.inf, n)
    quantile = STUDENT[n - 2] if n - 2 < len(STUDENT) else NORMAL
    half = quantile * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def by_problem(
    first: dict[int, Run], second: dict[int, Run], figures: Callable[[Run], Losses] = lambda run: run.losses
) -> Difference:
    """The same difference over problems: a ratio of means, total nats over total tokens, with its linearised error.

    Args:
        figures: a run's values with their weights, an example each, which two runs have in the same order.
    """
    seeds = sorted(first.keys() & second.keys())
    columns = [[figures(first[seed]) for seed in seeds], [figures(second[seed]) for seed in seeds]]
    examples = len(columns[0][0])
    tokens = [columns[0][0][i][1] for i in range(examples)]
    means = [[statistics.fmean(losses[i][0] for losses in column) for i in range(examples)] for column in columns]
    gaps = [a - b for a, b in zip(*means, strict=True)]
    mean = sum(t * gap for t, gap in zip(tokens, gaps, strict=True)) / sum(tokens)
    average = statistics.fmean(tokens)
    spread = [t / average * (gap - mean) for t, gap in zip(tokens, gaps, strict=True)]
    half = NORMAL * statistics.stdev(spread) / math.sqrt(examples)
    return Difference(mean, mean - half, mean + half, examples)


def rate_table(runs: Runs) -> TextTable:
    """Every method at its best rate."""
    rows = []
    for method, rates in runs.items():
        best = best_rate(rates)
        losses = [run.loss for run in rates[best].values()]
        deviation = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-"
        edge = "lowest" if best == min(rates) else "highest" if best == max(rates) else ""
        seconds = sum(run.seconds for seeds in rates.values() for run in seeds.values())
        cells = (f"{best:g}", f"{statistics.fmean(losses):.4f}", deviation, str(len(losses)), str(len(rates)))
        rows.append((method, *cells, edge, f"{seconds:.0f}"))
    titles = ("method", "best lr", "eval loss", "deviation", "seeds", "rates tried", "at the edge", "s of training")
    return TextTable(titles, rows, titles[1:], [])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--pair", nargs=2, action="append", default=[], metavar=("METHOD", "METHOD"))
    arguments = parser.parse_args()
    runs: Any = read(arguments.file)
    print(rate_table(runs))
    for names in arguments.pair:
        if missing := [name for name in names if name not in runs]:
            raise SystemExit(f"no finished run of {missing}; there are {', '.join(runs)}")
        chosen = [(name, best_rate(runs[name])) for name in names]
        first, second = (runs[name][rate] for name, rate in chosen)
        print("\n" + " against ".join(f"{name} at {rate:g}" for name, rate in chosen))
        if not first.keys() & second.keys():
            print("  no seed in common")
            continue
        print(f"  by seed     {by_seed(first, second)}\n  by problem  {by_problem(first, second)}")


if __name__ == "__main__":
    main()
