"""A packed study names the commit of runs that were made from a copy, and keeps which answers were correct."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galore_trainer.run.study.sweep import ablate

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
study_lines = pytest.importorskip("study_lines")


def test_answers_and_the_commit_survive_packing_twice(
    make_study: Callable[..., Any], in_process: list[list[str]], tmp_path: Path
) -> None:
    study = make_study({"learning_rate": [1e-3]}, "method=adamw", "eval.max_new_tokens=1")
    first, file, again = tmp_path / "first", tmp_path / "study.jsonl", tmp_path / "again.jsonl"
    ablate(study, first, say=lambda text: None)
    (result,) = first.glob("*/seed-*/result.json")
    changed = json.loads(result.read_text())
    changed["environment"]["commit"] = None
    result.write_text(json.dumps(changed))
    assert study_lines.pack(first, file, commit="c" * 40) == 1
    head, line = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [json.loads(row) for row in (result.parent / "predictions.jsonl").read_text().splitlines()]
    assert dict(zip(head["examples"], line["correct"], strict=True)) == {row["id"]: row["correct"] for row in rows}
    study_lines.unpack(file, tmp_path / "second")
    study_lines.pack(tmp_path / "second", again, commit="d" * 40)
    for packed in (file, again):  # runs that are packed again keep the commit that they were made at
        (read,) = study_lines.read_lines(packed)[1]
        assert read["result"]["environment"]["commit"] == "c" * 40
        assert read["correct"] == line["correct"]
