"""A study goes into one file of lines and out of it again; paired differences are those of the definition."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galore_trainer.run.report.runs import gather
from galore_trainer.run.study.sweep import ablate

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
paired, study_lines = pytest.importorskip("paired"), pytest.importorskip("study_lines")


def quiet(text: str) -> None:
    pass


def test_a_sweep_goes_on_from_a_file_and_is_reported(
    make_study: Callable[..., Any], in_process: list[list[str]], tmp_path: Path
) -> None:
    study = make_study({"learning_rate": [1e-3, 2e-3]}, "method=adamw", "eval.generate=false")
    first, second, file = tmp_path / "first", tmp_path / "second", tmp_path / "study.jsonl"
    assert study_lines.unpack(file, first) == 0
    ablate(study, first, max_cells=1, say=quiet)
    assert study_lines.pack(first, file) == 1
    assert study_lines.unpack(file, second) == 1
    assert len(in_process) == 1
    assert ablate(study, second, say=quiet).unfinished == 0
    assert len(in_process) == 2
    assert study_lines.pack(second, file) == 2
    head, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(line["losses"]) for line in lines] == [len(head["examples"])] * 2 == [4, 4]
    assert {name: set(rates) for name, rates in paired.read(file).items()} == {"": {1e-3, 2e-3}}
    for line in lines:
        total, tokens = (sum(loss * n for loss, n in line["losses"]), sum(n for _, n in line["losses"]))
        assert line["result"]["score_after"]["eval_loss"] == pytest.approx(total / tokens, abs=1e-6)
    assert len(gather([second]).runs) == 2


def run(*losses: float) -> Any:
    return paired.Run(sum(losses) / len(losses), [(loss, 10) for loss in losses], 1.0)


def test_differences_by_seed_and_by_problem_are_those_of_the_definition() -> None:
    first = {1: run(1.0, 2.0), 2: run(1.1, 2.3), 3: run(0.9, 2.2), 9: run(0.0, 0.0)}
    second = {1: run(1.2, 2.0), 2: run(1.3, 2.4), 3: run(1.0, 2.5)}
    seeds = paired.by_seed(first, second)
    gaps = [-0.1, -0.15, -0.2]
    assert (seeds.mean, seeds.n) == (pytest.approx(-0.15), 3)
    deviation = math.sqrt(sum((gap + 0.15) ** 2 for gap in gaps) / 2)
    assert seeds.high - seeds.mean == pytest.approx(4.303 * deviation / math.sqrt(3))
    problems = paired.by_problem(first, second)
    assert (problems.mean, problems.n) == (pytest.approx(-0.15), 2)
    assert paired.by_seed({1: first[1]}, second).low == -math.inf


def test_the_best_rate_is_chosen_among_those_with_all_seeds() -> None:
    rates = {1e-4: {1: run(2.0), 2: run(2.0)}, 2e-4: {1: run(1.5), 2: run(1.7)}, 4e-4: {1: run(0.1)}}
    assert paired.best_rate(rates) == 2e-4
