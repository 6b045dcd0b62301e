"""The studies of results/ that are files of JSON lines: their methods, their tables, and where each figure comes from.

A study is ``results/NAME/study.jsonl`` as ``benchmarks/study_lines.py`` packs it. Cells that differ in the learning
rate alone are one method, which counts at its best rate (``benchmarks/paired.py``).
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from blocks import table

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import paired  # noqa: E402 - the line above makes it importable
from study_lines import read_lines  # noqa: E402

from galore_trainer.run.results.columns import Column, columns  # noqa: E402

RESULTS = ROOT / "results"
FILE = "study.jsonl"
PACKAGES = ("python", "torch", "transformers", "peft", "galore-torch", "apollo-torch", "fira", "bitsandbytes")
FOLDERS = re.compile(r"(?<=[ =])/\S*/")
"""The folders of a file's absolute path in a command: a machine's, and nobody else's."""


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """The runs of one file.

    Attributes:
        name: of its folder.
        record: what ``galore-ft ablate`` wrote: title, question, commands, cells with the status of each run.
        examples: ids of the held-out examples.
        runs: method -> learning rate -> seed -> run.
    """

    name: str
    record: Mapping[str, Any]
    examples: Sequence[str]
    runs: paired.Runs

    def only(self, seeds: Container[int]) -> Study:
        """The study of some seeds alone; a method or a rate without any is left out."""
        runs: paired.Runs = {}
        for method, rates in self.runs.items():
            kept = {rate: {s: run for s, run in by.items() if s in seeds} for rate, by in rates.items()}
            if kept := {rate: by for rate, by in kept.items() if by}:
                runs[method] = kept
        return dataclasses.replace(self, runs=runs)

    def rate(self, method: str) -> float:
        """The method's best learning rate."""
        return paired.best_rate(self.runs[method])

    def best(self, method: str) -> dict[int, paired.Run]:
        """The method's runs at its best rate, by seed."""
        return self.runs[method][self.rate(method)]

    def loss(self, method: str) -> float:
        """The method's mean loss at its best rate."""
        return statistics.fmean(run.loss for run in self.best(method).values())

    def ranked(self) -> list[str]:
        """Its methods, the lowest loss first."""
        return sorted(self.runs, key=self.loss)

    def at_edge(self, method: str) -> str:
        """Whether the best rate is the ``lowest`` or ``highest`` of several; empty where it is neither."""
        rates, best = self.runs[method], self.rate(method)
        if len(rates) == 1 or min(rates) < best < max(rates):
            return ""
        return "lowest" if best == min(rates) else "highest"

    def results(self) -> list[Mapping[str, Any]]:
        """The result of every run."""
        return [run.result for rates in self.runs.values() for seeds in rates.values() for run in seeds.values()]

    def seeds(self) -> set[int]:
        """Those of its runs."""
        return {result["seed"] for result in self.results()}

    @property
    def searches(self) -> bool:
        """Whether it tried several learning rates of a method."""
        return any(len(rates) > 1 for rates in self.runs.values())

    @property
    def shared(self) -> bool:
        """Whether runs shared their device, so that times and peaks of memory compare nothing."""
        return any(not run["exclusive"] for cell in self.record["cells"] for run in cell["runs"])

    @property
    def link(self) -> str:
        """Its name, as a link from a page in results/."""
        return f"[{self.name}]({self.name}/README.md)"

    def unfinished(self) -> list[str]:
        """Runs that were planned and did not end, with what became of them."""
        return [
            f"{cell['name']}, seed {run['seed']} ({': '.join(filter(None, (run['status'], run['reason'])))})"
            for cell in self.record["cells"]
            for run in cell["runs"]
            if run["status"] != "finished"
        ]

    def source(self) -> str:
        """One line: command, commit, device, versions, seeds, and n; all of it from the records of the runs."""
        results = self.results()
        places = [result["environment"] for result in results]
        versions = {
            name: used for name in PACKAGES if (used := {v for place in places if (v := place["versions"].get(name))})
        }
        seeds = sorted(self.seeds())
        planned = sum(len(cell["runs"]) for cell in self.record["cells"])
        commits = {(place["commit"] or "not recorded")[: 7 if place["commit"] else None] for place in places}
        resumed = sum(result.get("resumed_from_step") is not None for result in results)
        went_on = f" ({resumed} resumed from a checkpoint)" if resumed else ""
        counts = {result["score_after"]["n"] for result in results}
        parts = (
            " and ".join(dict.fromkeys(f"`{FOLDERS.sub('', command)}`" for command in self.record["commands"])),
            f"commit {listed(commits)}",
            listed({place["device"] for place in places}) + (", runs side by side" if self.shared else ""),
            ", ".join(f"{name} {listed(used)}" for name, used in versions.items()),
            f"seed{'s' * (len(seeds) > 1)} {spans(seeds)}",
            f"n = {len(results)} of {planned} runs{went_on}, {listed(map(str, counts))} held-out examples",
        )
        return f"{self.name}: {'; '.join(parts)}."


class Pair(NamedTuple):
    """Two methods to compare: the first of a study, the second of it or of another one of equal examples."""

    first: tuple[Study, str]
    second: tuple[Study, str]

    @property
    def name(self) -> str:
        """Both methods."""
        return f"{self.first[1]} - {self.second[1]}"

    def runs(self) -> tuple[dict[int, paired.Run], dict[int, paired.Run]]:
        """The runs of both at their best rates."""
        (one, method), (other, against) = self
        return one.best(method), other.best(against)

    def comparable(self) -> bool:
        """Whether both have a seed in common and losses of the same examples."""
        first, second = self.runs()
        whole = all(run.losses for runs in (first, second) for run in runs.values())
        return bool(first.keys() & second.keys()) and whole and self.first[0].examples == self.second[0].examples

    def by_seed(self) -> paired.Difference:
        """Of the losses; an infinite interval for one seed."""
        return paired.by_seed(*self.runs())

    def by_problem(self) -> paired.Difference:
        """Of the losses."""
        return paired.by_problem(*self.runs())


def studies(root: Path = RESULTS) -> dict[str, Study]:
    """Every study of a folder that has a finished run, by name."""
    named = {}
    for file in sorted(root.glob(f"*/{FILE}")):
        head, _ = read_lines(file)
        if runs := paired.read(file):
            named[file.parent.name] = Study(file.parent.name, head["study"], head["examples"], runs)
    return named


def sources(used: Iterable[Study]) -> str:
    """What stands below a table: where its figures come from, a line a study."""
    return "\n" + "".join(f"{study.source()}\n\n" for study in dict.fromkeys(used)).removesuffix("\n")


def shown(gap: paired.Difference, digits: int = 4) -> str:
    """A difference with its interval."""
    if gap.n < 2:
        return f"{gap.mean:+.{digits}f}"
    return f"{gap.mean:+.{digits}f} [{gap.low:+.{digits}f}, {gap.high:+.{digits}f}]"


def rates_table(study: Study) -> str:
    """Every rate of every method, the lowest loss first; the best rate is bold."""
    rows = []
    for method in study.ranked():
        best = study.rate(method)
        cells = []
        for rate, seeds in sorted(study.runs[method].items()):
            text = f"{rate:g}: {statistics.fmean(run.loss for run in seeds.values()):.4f}"
            cells.append(f"**{text}**" if rate == best else text)
        rows.append((method, ", ".join(cells), study.at_edge(method)))
    return table([("method", "learning rate: eval loss", "best at the edge"), *rows])


def methods_table(study: Study) -> str:
    """Each method at its best rate, the lowest loss first: mean and standard deviation over seeds."""
    results = study.results()
    beside = ("state_bytes",) if study.shared else ("state_bytes", "peak_memory", "seconds_per_step")
    used = [
        column
        for key, column in columns(results).items()
        if (column.group == "quality" or key in beside) and any(values(column, results))
    ]
    rows = []
    for method in study.ranked():
        runs = [run.result for run in study.best(method).values()]
        cells = [column.show(values(column, runs)) for column in used]
        rows.append((method, f"{study.rate(method):g}", *cells, str(len(runs))))
    head = ("method", "learning rate", *(column.title for column in used), "seeds")
    return table([head, *rows], numbers=len(head) - 1)


def values(column: Column, results: Iterable[Mapping[str, Any]]) -> list[float]:
    """A column's figure of each result that has one."""
    return [figure for result in results if (figure := column.read(result, result)) is not None]


def pairs_table(pairs: Sequence[Pair], head: str = "difference in eval loss") -> str:
    """Differences at the best rates with 95 % intervals: of losses by seed, where there are several, and by problem.

    Where every run of a pair has a score, its difference by seed follows, and that by problem where answers were kept.
    """
    runs = [[run for side in pair.runs() for run in side.values()] for pair in pairs]
    score = columns(run.result for some in runs for run in some)["score"]
    scored = [len(values(score, [run.result for run in some])) == len(some) for some in runs]
    answered = [all(run.correct for run in some) for some in runs]
    seeds = any(pair.by_seed().n > 1 for pair in pairs)

    def figure(run: paired.Run) -> float:
        return score.factor * values(score, [run.result])[0]

    rows = []
    for pair, has_score, has_answers in zip(pairs, scored, answered, strict=True):
        row = [pair.name, *[shown(pair.by_seed())] * seeds, shown(pair.by_problem())]
        if any(scored):
            row.append(shown(paired.by_seed(*pair.runs(), figure), 1) if has_score else "-")
        if any(answered):
            row.append(shown(paired.by_problem(*pair.runs(), paired.Run.answers), 1) if has_answers else "-")
        rows.append(row)
    titles = (head, *["by seed"] * seeds, "by problem", *[f"{score.title}, by seed"] * any(scored))
    return table([(*titles, *["answers by problem"] * any(answered)), *rows])


def listed(names: Iterable[str]) -> str:
    """Names in their order, with commas."""
    return ", ".join(sorted(set(names)))


def spans(numbers: Sequence[int]) -> str:
    """Whole numbers in their order; three or more that follow each other as ``1 to 8``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
