"""A run that is over stays as it is, however often it is resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from galore_trainer.run.launching.checkpoints import checkpoints
from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training.train import train

pytestmark = pytest.mark.usefixtures("short_end")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 5},  # within the second epoch of three steps
        {"max_steps": 6},  # at its end
        {"max_steps": -1, "num_train_epochs": 1.5, "save_strategy": "epoch"},
        {"max_steps": 5, "method": "adamw", "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True},
    ],
)
def test_nothing_is_trained_past_the_end(
    settings: dict[str, Any], short_run: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"source": "embedded:arithmetic", "train_samples": 6, "eval_samples": 2}
    more = {
        "lr_scheduler_type": "constant",
        "save_steps": 2,
        "save_total_limit": 1,
        "data": data,
        "learning_rate": 3e-2,
    }
    config = short_run(**{**more, **settings})
    run = Path(config.output_dir)
    first = train(config).result
    whole, saved = weights(run), checkpoints(run)
    fewer = short_run(**{**more, "data": data, **settings, "max_steps": 4})
    for resumed in (config, fewer):
        shutil.rmtree(run / "model")
        capsys.readouterr()
        again = train(resumed, resume="auto").result
        assert "nothing is left to train" in capsys.readouterr().out
        assert again["steps"] == first["steps"] == again["resumed_from_step"]
        assert again["score_after"]["eval_loss"] == first["score_after"]["eval_loss"]
        assert checkpoints(run) == saved
        assert all(torch.equal(whole[name], weight) for name, weight in weights(run).items())
