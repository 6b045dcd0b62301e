"""Two processes tokenize once between them, and their packed step is that of one process with the same examples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training.train import train

SCRIPT = Path(__file__).with_name("packed_ddp.py")


def losses(config: RunConfig) -> list[float]:
    rows = map(json.loads, (Path(config.output_dir) / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


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
    }
    two = short_run("two", **more)
    (tmp_path / "two.yaml").write_text(two.to_yaml())
    (tmp_path / "calls").mkdir()
    torchrun(2, SCRIPT, str(tmp_path / "two.yaml"), str(tmp_path / "calls"))
    assert sorted(path.name.partition("-")[0] for path in (tmp_path / "calls").iterdir()) == ["4", "6"]
    one = short_run("one", **more, gradient_accumulation_steps=2)
    train(one)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
