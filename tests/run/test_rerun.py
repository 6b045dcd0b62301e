"""One run of each study is chosen, trained again with its recorded settings, and compared."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from galore_trainer.cli.main import main
from galore_trainer.run.study.sweep import ablate

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
rerun, study_lines = pytest.importorskip("rerun"), pytest.importorskip("study_lines")


def test_a_run_again_has_the_settings_and_the_loss_of_the_recorded_one(
    make_study: Callable[..., Any],
    in_process: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = make_study({"learning_rate": [1e-3, 2e-3]}, "method=adamw", "eval.generate=false")
    file, lines = tmp_path / "of" / "study.jsonl", tmp_path / "lines.jsonl"
    ablate(study, tmp_path / "first", say=lambda text: None)
    study_lines.pack(tmp_path / "first", file)
    chosen = rerun.choose(file, seed=0)
    assert chosen == rerun.choose(file, seed=0)
    assert {rerun.choose(file, seed)["folder"] for seed in range(20)} == {
        line["folder"] for line in study_lines.read_lines(file)[1]
    }
    here = contextlib.nullcontext(SimpleNamespace(map=map))  # training takes signals, which only the main thread may
    monkeypatch.setattr(rerun.concurrent.futures, "ThreadPoolExecutor", lambda jobs: here)
    monkeypatch.setattr(rerun, "start", lambda words, log: main(words))
    monkeypatch.setattr(sys, "argv", ["rerun", str(file), "--folder", str(tmp_path / "again"), "--lines", str(lines)])
    rerun.main()
    row = json.loads(lines.read_text())
    assert row["recorded"] == row["again"] == chosen["result"]["score_after"]["eval_loss"]
    assert row["difference"]["mean"] == 0.0
    assert row["within"]
    assert f"| of | {chosen['folder']} |" in capsys.readouterr().out


def test_another_loss_is_not_within() -> None:
    def line(loss: float) -> dict[str, Any]:
        result = {"score_after": {"eval_loss": loss}, "environment": dict.fromkeys(("commit", "device", "versions"))}
        return {"folder": "a/seed-0", "result": result, "losses": [[loss, 10]] * 4}

    assert not rerun.compare(Path("x/study.jsonl"), line(0.77), line(0.78), 0.0028)["within"]
    assert rerun.compare(Path("x/study.jsonl"), line(0.77), line(0.772), 0.0028)["within"]
