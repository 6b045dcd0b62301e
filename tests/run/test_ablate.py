"""Sweeps: every packaged study at a tiny setting, resuming, failing cells, Ctrl-C, timing passes, plans, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from forked import python
from galore_trainer.errors import OptionError
from galore_trainer.run.report.write import report
from galore_trainer.run.settings.run_config import load_run_config
from galore_trainer.run.study import sweep as module
from galore_trainer.run.study.grid import load_study, packaged_studies
from galore_trainer.run.study.record import read_result, timing_config
from galore_trainer.run.study.sweep import ablate, failure
from galore_trainer.run.study.sweep_plan import describe_sweep

MakeStudy = Callable[..., Any]


def entries(output: Path) -> dict[str, dict[str, Any]]:
    """The record of every run, by folder."""
    record = json.loads((output / "study.json").read_text())
    return {run["folder"]: run for cell in record["cells"] for run in cell["runs"]}


def quiet(text: str) -> None:
    pass


@pytest.mark.parametrize("name", packaged_studies())
def test_a_packaged_study_runs_and_is_reported(
    name: str, tiny_base: Path, in_process: list, undrawn: None, tmp_path: Path
) -> None:
    study = load_study(
        name, [f"base={tiny_base}", *(["galore.head_group_size=2"] if name == "cross_head" else [])], [0]
    )
    two = dataclasses.replace(study, cells=(study.cells[-1], study.cells[0]) if name != "rank" else study.cells[:2])
    outcome = ablate(two, tmp_path / "out", say=quiet)
    assert outcome == module.Outcome({}, 0, False)
    for cell in two.cells:
        result = read_result(tmp_path / "out" / cell.slug / "seed-0")
        assert result["score_after"]["eval_loss"] > 0
        assert result["score_before"] is None
        assert not (tmp_path / "out" / cell.slug / "seed-0" / "model").exists()
        if result["method"].startswith("galore") and name != "rates":  # which serves methods without projection, too
            assert result["projection_error"]["excess"] is not None
            assert "sharing_excess" in result["projection_error"]
    page = report([tmp_path / "out"], tmp_path / "report")[0].read_text()
    assert study.question in page
    assert all(cell.name in page for cell in two.cells)


def test_the_same_command_resumes_a_sweep(make_study: MakeStudy, in_process: list, tmp_path: Path) -> None:
    study = make_study({"galore.rank": [2, 4]}, seeds=[0, 1])
    output = tmp_path / "out"
    outcome = ablate(study, output, max_cells=1, say=quiet)
    assert outcome.unfinished == 3
    first = output / "rank-2" / "seed-0" / "result.json"
    before = first.stat().st_mtime_ns
    assert ablate(study, output, only="RANK 4", say=quiet).unfinished == 1
    assert entries(output)["rank-4/seed-1"]["status"] == "finished"
    assert ablate(study, output, say=quiet).unfinished == 0
    assert len(in_process) == 4
    assert first.stat().st_mtime_ns == before
    assert ablate(study, output, say=quiet).unfinished == 0
    assert len(in_process) == 4
    assert [run["steps"] for run in entries(output).values()] == [4] * 4


def test_a_killed_sweep_takes_its_runs_with_it_and_resumes(
    make_study: MakeStudy, in_process: list, tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    overrides = ["max_steps=120", "save_strategy=steps", "save_steps=5", "save_total_limit=3"]
    study = make_study({"galore.rank": [2]}, *overrides)
    words = ["ablate", str(tmp_path / "small.yaml"), *overrides, "--output-dir", str(output)]
    run = output / "rank-2" / "seed-0"
    deadline = time.monotonic() + 120
    with python([sys.executable, "-m", "galore_trainer.cli", *words]) as sweep:
        while not list(run.glob("checkpoint-*/manifest.json")) and sweep.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        sweep.kill()
        assert sweep.wait(60) == -signal.SIGKILL
    time.sleep(0.2)
    size = (run / "log.jsonl").stat().st_size
    assert entries(output)["rank-2/seed-0"]["status"] == "running"
    assert "interrupted" in describe_sweep(study, output)
    time.sleep(0.5)
    if sys.platform == "linux":
        assert (run / "log.jsonl").stat().st_size == size
    assert ablate(study, output, say=quiet) == module.Outcome({}, 0, False)
    result = read_result(run)
    assert result["steps"] == 120
    assert result["resumed_from_step"] >= 5


def test_a_run_without_a_whole_checkpoint_starts_anew(make_study: MakeStudy, in_process: list, tmp_path: Path) -> None:
    study, output = make_study({"galore.rank": [2]}), tmp_path / "out"
    half = output / "rank-2" / "seed-0" / "checkpoint-2"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_text("the beginning of a mod")
    (output / "study.json").write_text(json.dumps({"name": "small", "cells": []}))
    assert ablate(study, output, say=quiet).failed == {}
    assert read_result(half.parent)["resumed_from_step"] is None


def test_a_failed_cell_is_recorded_and_the_rest_go_on(make_study: MakeStudy, in_process: list, tmp_path: Path) -> None:
    study, output = make_study({"galore.rank": [4000, 4]}), tmp_path / "out"
    said: list[str] = []
    outcome = ablate(study, output, say=said.append)
    assert list(outcome.failed) == ["rank 4000, seed 0"]
    assert outcome.failed["rank 4000, seed 0"].startswith("galore.rank: got 4000, wanted at most 64")
    assert any("rank-4000/seed-0 failed: galore.rank" in line for line in said)
    assert any("rank-4/seed-0 finished" in line and "eval loss" in line for line in said)
    failed, fine = entries(output).values()
    assert (failed["status"], failed["exit_code"], fine["status"]) == ("failed", 2, "finished")
    assert "got 4000" in failed["log_tail"][-1]
    assert "got 4000" in (output / "rank-4000" / "seed-0.log").read_text()
    ablate(study, output, say=quiet)
    assert [Path(words[1]).parent.name for words in in_process] == ["rank-4000", "rank-4", "rank-4000"]
    page = report([output], tmp_path / "report")[0].read_text()
    assert "failed: galore.rank: got 4000" in page


def test_runs_side_by_side_are_timed_once_more_alone(make_study: MakeStudy, in_process: list, tmp_path: Path) -> None:
    study, output = make_study({"galore.rank": [2, 4]}, "max_steps=6", seeds=[0, 1]), tmp_path / "out"
    ablate(study, output, jobs=2, keep_models=True, say=quiet)
    names = [Path(words[1]).stem for words in in_process]
    assert names == ["seed-0", "seed-0", "seed-1", "seed-1", "timing", "timing"]
    timing = read_result(output / "rank-2" / "timing")
    assert timing["steps"] == 4  # two gaps of two
    assert timing["score_after"]["n"] == 1
    assert (output / "rank-2" / "seed-1" / "model" / "model.safetensors").exists()
    assert not (output / "rank-2" / "timing" / "model").exists()
    assert not entries(output)["rank-2/seed-0"]["exclusive"]
    ablate(study, output, say=quiet)
    assert len(in_process) == 6


def test_timing_passes_can_wait(make_study: MakeStudy, in_process: list, tmp_path: Path) -> None:
    study, output = make_study({"galore.rank": [2, 4]}), tmp_path / "out"
    assert ablate(study, output, jobs=2, timing=False, say=quiet).unfinished == 0
    assert [Path(words[1]).stem for words in in_process] == ["seed-0", "seed-0"]
    ablate(study, output, say=quiet)
    assert [Path(words[1]).stem for words in in_process[2:]] == ["timing", "timing"]


def test_runs_side_by_side_spread_over_the_devices(make_study: MakeStudy, monkeypatch, tmp_path: Path) -> None:
    given: list[str] = []

    def start(command: list[str], log: IO[bytes], environment: dict[str, str]) -> Any:
        given.append(environment["CUDA_VISIBLE_DEVICES"])
        answers = iter([None, None, 1])
        process = types.SimpleNamespace(returncode=1)
        process.poll = lambda: process.returncode if (answer := next(answers, 1)) else answer
        return process

    monkeypatch.setattr(module, "start_process", start)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5")
    ablate(make_study({"galore.rank": [2, 3, 4, 5]}), tmp_path / "out", jobs=4, timing=False, say=quiet)
    assert given == ["3", "GPU-5", "3", "GPU-5"]


def test_a_timing_pass_is_the_same_run_but_for_its_length() -> None:
    config = load_run_config("quickstart", ["eval_strategy=steps", "eval_steps=5", "galore.diagnose_refreshes=3"])
    for gap, steps, expected in ((50, 160, 100), (50, 30, 30), (200, 1000, 400), (300, 1000, 300)):
        run = dataclasses.replace(config, galore=dataclasses.replace(config.galore, update_proj_gap=gap))
        short = timing_config(run, steps)
        assert short.training["max_steps"] == expected
        assert (short.training["eval_strategy"], short.training["save_strategy"]) == ("no", "no")
        assert (short.galore.diagnose_refreshes, short.eval.limit, short.eval.before) == (0, 1, False)
        assert short.data == run.data


STUB = """
import signal, sys, time
count = 0
def note(number, frame):
    global count
    count += 1
    print("signal", count, flush=True)
signal.signal(signal.SIGINT, note)
print("ready", flush=True)
while count < {patience}:
    time.sleep(0.01)
sys.exit(130)
"""


@pytest.mark.parametrize("patience", [1, 2, 100])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_runs_softly_and_harder_each_time(
    number: int, patience: int, make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, output = make_study({"galore.rank": [2, 4, 8]}), tmp_path / "out"
    real, processes = module.start_process, []

    def start(command: list[str], log: IO[bytes], environment: dict[str, str]) -> Any:
        process = real([sys.executable, "-c", STUB.format(patience=patience)], log, environment)
        processes.append(process)
        path = Path(command[4]).with_suffix(".log")
        while "ready" not in path.read_text():
            time.sleep(0.01)
        if len(processes) == 2:
            os.kill(os.getpid(), number)
        return process

    def interrupt_again(text: str) -> None:
        if text.startswith("interrupted"):
            signal.setitimer(signal.ITIMER_REAL, 0.3, 0.3)

    monkeypatch.setattr(module, "start_process", start)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
    try:
        outcome = ablate(study, output, jobs=2, say=interrupt_again)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert outcome.interrupted
    assert len(processes) == 2
    codes = {1: 130, 2: 130, 100: -signal.SIGKILL}
    assert processes[0].returncode == codes[patience]
    heard = (output / "rank-2" / "seed-0.log").read_text().count("signal")
    assert heard == min(patience, 2)
    assert entries(output)["rank-8/seed-0"]["status"] == "waiting"


def test_the_plan_changes_nothing_and_estimates_from_what_is_finished(
    make_study: MakeStudy, in_process: list, tmp_path: Path
) -> None:
    study, output = (
        make_study({"galore.rank": [2, 4]}, "max_steps=-1", "num_train_epochs=0.5", seeds=[0, 1]),
        tmp_path / "out",
    )
    plan = describe_sweep(study, output, jobs=2)
    assert not output.exists()
    assert "2 cells x 2 seeds" in plan
    assert "rank 2       10" in plan  # 40 examples, 2 at a time, half an epoch
    assert "now to run: 4 of 4 (4 waiting), 2 at a time" in plan
    assert "alone on the device: 4 steps" in plan
    assert "no estimate" in plan
    ablate(study, output, max_cells=1, say=quiet)
    record = json.loads((output / "study.json").read_text())
    record["cells"][0]["runs"][0]["wall_seconds"] = 20.0
    (output / "study.json").write_text(json.dumps(record))
    assert "about 60 s, from 1 finished runs: 2 s for each of 30 steps" in describe_sweep(study, output)
    assert "about 20 s" in describe_sweep(study, output, only="rank 2")


def test_a_folder_with_something_else_is_refused_and_left_alone(
    make_study: MakeStudy, in_process: list, tmp_path: Path
) -> None:
    study, output = make_study({"galore.rank": [2]}), tmp_path / "out"
    ablate(study, output, say=quiet)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(OptionError, match=r"rank-2/seed-0 was run with max_steps=4, this study says 9"):
        ablate(make_study({"galore.rank": [2]}, "max_steps=9"), output, say=quiet)
    with pytest.raises(OptionError, match="holds the study 'small'"):
        ablate(load_study("rank"), output, say=quiet)
    with pytest.raises(OptionError, match=r"--only.*The cells are rank 2"):
        ablate(study, output, only="rank 3", say=quiet)
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(OptionError, match="empty or new folder"):
        ablate(study, tmp_path / "thesis", say=quiet)
    with pytest.raises(OptionError, match="no other sweep"), _locked(output):
        ablate(study, output, say=quiet)


def test_further_seeds_and_cells_join_an_earlier_sweep(make_study: MakeStudy, in_process: list, tmp_path: Path) -> None:
    output = tmp_path / "out"
    ablate(make_study({"galore.rank": [2]}), output, say=quiet)
    ablate(make_study({"galore.rank": [4]}, seeds=[1]), output, say=quiet)
    assert {folder: run["status"] for folder, run in entries(output).items()} == {
        "rank-4/seed-1": "finished",
        "rank-2/seed-0": "finished",
    }


def test_data_that_is_not_there_is_refused_before_any_run(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study({"galore.rank": [2]}, "data.source=nowhere.jsonl", "data.train_samples=null")
    with pytest.raises(OptionError, match=r"data\.source"):
        ablate(study, tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()


def _locked(output: Path) -> Any:
    from filelock import FileLock

    return FileLock(output / ".sweep.lock")


@pytest.mark.parametrize(
    ("code", "lines", "reason"),
    [
        (
            1,
            ["step 3", "Failed: CUDA out of memory. Tried", "Add --debug for"],
            "out of memory: CUDA out of memory. Tried",
        ),
        (2, ["Error on rank 0: galore.rank: got 0"], "galore.rank: got 0"),
        (-9, ["step 3"], "ended by SIGKILL, as a system short of memory does"),
        (-11, [], "ended by SIGSEGV"),
        (1, ["Traceback", "KeyError: 'x'"], "KeyError: 'x'"),
        (3, [], "exit code 3"),
    ],
)
def test_the_reason_of_a_failure_is_one_line(code: int, lines: list[str], reason: str) -> None:
    assert failure(code, lines) == reason
