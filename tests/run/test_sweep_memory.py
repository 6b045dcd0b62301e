"""``--jobs auto``: as many runs at a time as their memory is estimated to fit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galore_trainer.cli.main import main
from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.study import sweep_memory
from galore_trainer.run.study.sweep_memory import PROCESS, choose_jobs, run_bytes, scoring_bytes

Run = Callable[..., RunConfig]
MIB = 1 << 20


def test_a_run_takes_more_the_larger_its_batches(short_run: Run) -> None:
    small = run_bytes(short_run())
    assert run_bytes(short_run(per_device_train_batch_size=32)) > 2 * small
    scored = short_run(eval={"max_new_tokens": 100, "batch_size": 256})
    # 256 rows, 500 tokens, keys and values of 3 layers with 2 heads of 16, in float32; logits of 256 in it twice
    assert scoring_bytes(scored) == 256 * 500 * 3 * 2 * 2 * 16 * 4 + 256 * 256 * 8
    assert run_bytes(scored) > scoring_bytes(scored)


@pytest.mark.parametrize(
    ("free", "devices", "jobs"),
    [
        ([1000], ["0"], 4),
        ([1000, 1000], ["0", "1"], 5),
        ([210], ["0"], 1),
        ([400, 210], ["0", "1"], 1),
        ([0], ["0"], 1),
    ],
)
def test_the_largest_run_decides(
    free: list[int], devices: list[str], jobs: int, short_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 200 MiB; nine tenths of what is free are used."""
    monkeypatch.setattr(sweep_memory, "PROCESS", {"cuda": 0, "cpu": 0})
    monkeypatch.setattr(sweep_memory, "run_bytes", lambda config: config.galore.rank * MIB)
    monkeypatch.setattr(sweep_memory, "_free_of_devices", lambda environment: [each * MIB for each in free])
    configs = [short_run(use_cpu=False, galore={"rank": rank}) for rank in (10, 200, 100, 50, 25)]
    found, reason = choose_jobs(configs, devices, {})
    assert found == jobs
    assert f"{jobs} at a time: the largest run takes about 200.0 MiB" in reason


def test_on_a_cpu_there_are_no_more_than_cores(short_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_memory, "run_bytes", lambda config: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(3)}, raising=False)
    configs = [short_run(seed=seed) for seed in range(9)]
    for free, jobs in ((100 * PROCESS["cpu"], 3), (2.5 * PROCESS["cpu"], 2), (0, 1)):
        monkeypatch.setattr(sweep_memory, "_free_of_system", lambda free=free: int(free))
        assert choose_jobs(configs, [], {})[0] == jobs


def test_a_sweep_takes_auto(
    make_study: Callable[..., Any],
    in_process: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_study({"galore.rank": [2, 4]})
    monkeypatch.setattr("galore_trainer.run.study.sweep.choose_jobs", lambda *args: (2, "2 at a time: so it is"))
    words = ["ablate", str(tmp_path / "small.yaml"), "--output-dir", str(tmp_path / "out"), "--jobs"]
    assert main([*words, "auto", "--no-timing"]) == 0
    assert "2 at a time: so it is" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [run["exclusive"] for cell in record["cells"] for run in cell["runs"]] == [False, False]
    assert main([*words, "auto", "--dry-run"]) == 0
    for wrong in ("0", "-1", "many", "1.5", ""):
        assert main([*words, wrong]) == 2
        assert "--jobs: got" in capsys.readouterr().err
