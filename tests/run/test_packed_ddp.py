"""Two processes tokenize once between them, and their packed step is that of one process with the same examples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training.train import train

SCRIPT = Path(__file__).with_name("packed_ddp.py")


def losses(config: RunConfig) -> list[float]:
    rows = map(json.loads, (Path(config.output_dir) / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def result(config: RunConfig) -> dict[str, Any]:
    return json.loads((Path(config.output_dir) / "result.json").read_text())


@pytest.mark.alone
def test_two_processes_take_the_steps_of_one(
    short_run: Callable[..., RunConfig],
    torchrun: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GALORE_TRAINER_CACHE", str(tmp_path / "cache"))
    more = {
        "method": "adamw",
        "save_strategy": "no",
        "max_steps": 2,
        "max_length": 700,
        "packing": True,
        "per_device_train_batch_size": 1,
        "data": {"train_samples": 6, "eval_samples": 4},
        "eval": {
            "generate": False,
            "also": {"other": {"source": "embedded:arithmetic", "split_seed": 1, "eval_samples": 3}},
        },
    }
    two = short_run("two", **more)
    (tmp_path / "two.yaml").write_text(two.to_yaml())
    (tmp_path / "calls").mkdir()
    torchrun(2, SCRIPT, str(tmp_path / "two.yaml"), str(tmp_path / "calls"))
    assert sorted(path.name.partition("-")[0] for path in (tmp_path / "calls").iterdir()) == ["3", "4", "6"]
    one = short_run("one", **more, gradient_accumulation_steps=2)
    train(one)
    for when in ("score_before", "score_after"):
        of_two, of_one = (result(config)[when]["also"]["other"] for config in (two, one))
        assert of_two == {**of_one, "eval_loss": pytest.approx(of_one["eval_loss"], abs=1e-4)}
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
