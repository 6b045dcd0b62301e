"""A resumed run whose checkpoint keeps a learning rate says so in its result and its card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training.train import train

Run = Callable[..., RunConfig]


def test_result_and_card_name_what_the_checkpoint_kept(short_run: Run) -> None:
    first = short_run("run", max_steps=2, save_strategy="steps", save_steps=2)
    train(first)
    again = short_run("run", max_steps=3, save_strategy="steps", save_steps=2, learning_rate=5e-3)
    folder = Path(train(again, resume="auto").output_dir)
    told = json.loads((folder / "result.json").read_text())["overruled_by_checkpoint"]
    assert "now asked for: 0.005" in told
    assert told in (folder / "model" / "README.md").read_text()
