"""A study takes over equal runs of another one; skipped metrics are scored later; every file in benchmarks resolves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from galore_trainer.metrics.nlg import nlg_scores
from galore_trainer.run.report.runs import gather
from galore_trainer.run.study.grid import load_study
from galore_trainer.run.study.sweep import ablate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
study_lines = pytest.importorskip("study_lines")


def quiet(text: str) -> None:
    pass


def test_equal_settings_and_seeds_are_run_once(
    make_study: Callable[..., Any], in_process: list[list[str]], tiny_base: Path, tmp_path: Path
) -> None:
    words = ["method=adamw", "eval.generate=false"]
    file = tmp_path / "study.jsonl"
    ablate(make_study({"learning_rate": [1e-3, 2e-3]}, *words), tmp_path / "first", say=quiet)
    study_lines.pack(tmp_path / "first", file, commit="abc")
    cells = [{"name": "slow", "learning_rate": 1e-3}, {"name": "fast", "learning_rate": 2e-3}, {"learning_rate": 3e-3}]
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"base": str(tiny_base), "cells": cells, "seeds": [0]}))
    study, folder = load_study(other, words), tmp_path / "second"
    assert study_lines.borrow(file, folder, study) == 2
    assert study_lines.borrow(file, folder, study) == 0
    in_process.clear()
    assert ablate(study, folder, say=quiet).unfinished == 0
    assert len(in_process) == 1
    taken = json.loads((folder / "fast" / "seed-0" / "result.json").read_text())
    assert taken["taken_from"] == {"study": "small", "commit": "abc"}
    assert (folder / "fast" / "seed-0" / "losses.jsonl").is_file()
    assert [len(group.runs) for group in gather([folder]).groups] == [1, 1, 1]
    assert study_lines.borrow(file, tmp_path / "third", load_study(other, [*words, "max_steps=3"])) == 0


def test_skipped_metrics_are_scored_from_the_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a pub in the old town", "a cheap pub"]
    references = [["a pub in the old town", "an old pub"], ["it is cheap"]]
    whole = nlg_scores(texts, references) | {"meteor": 0.25}
    del whole["per_example"]
    run = tmp_path / "cell" / "seed-1"
    run.mkdir(parents=True)
    skipped = {**whole, "meteor": None, "rouge1": None, "eval_loss": 1.0, "metric": "bleu", "score": whole["bleu"]}
    (run / "result.json").write_text(json.dumps({"score_after": skipped}))
    lines = [{"prediction": text, "references": right} for text, right in zip(texts, references, strict=True)]
    (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("galore_trainer.run.scoring.score.nlg_scores", lambda *_: {**whole, "per_example": []})
    assert study_lines.rescore(tmp_path) == 1
    assert json.loads((run / "result.json").read_text())["score_after"] == {**skipped, **whole}


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_study_resolves(file: Path) -> None:
    study = load_study(file)
    assert study.title
    assert study.question
    assert study.metrics
