"""A short run of the tiny model, for the tests that train one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from galore_trainer.run.config import RunConfig


@pytest.fixture
def short_run(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """``short_run("name", key=value, ...)``: six steps in a folder of that name, with these settings above."""

    def configure(name: str = "run", **more: object) -> RunConfig:
        settings = {
            "model_name_or_path": str(tiny_model_dir), "output_dir": str(tmp_path / name), "max_length": 400,
            "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1,
            "save_steps": 4, "use_cpu": True, "disable_tqdm": True, "seed": 5,
            "galore": {"rank": 4, "update_proj_gap": 2}, "lora": {"rank": 4, "alpha": 8},
            "data": {"source": "embedded:arithmetic", "train_samples": 40, "eval_samples": 4},
            "eval": {"max_new_tokens": 4, "before": False},
        }  # fmt: skip
        return RunConfig.from_dict({**settings, **more})

    return configure
