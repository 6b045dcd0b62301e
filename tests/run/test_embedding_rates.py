"""AdamW with a learning rate of its own for embeddings, output layer and norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from galore_trainer.errors import OptionError
from galore_trainer.run.launching.plan import learning_rates
from galore_trainer.run.settings.methods import METHODS
from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training.train import train

Run = Callable[..., RunConfig]
ONE_STEP = {"method": "adamw", "max_steps": 1, "save_strategy": "no", "data": {"train_samples": 8, "eval_samples": 0}}


def moved(config: RunConfig) -> dict[str, torch.Tensor]:
    train(config)
    before = load_file(Path(config.model_name_or_path) / "model.safetensors")
    after = load_file(Path(config.output_dir) / "model" / "model.safetensors")
    return {name: after[name] - before[name] for name in after}


def test_a_step_of_the_others_is_that_share_of_adamw_s(short_run: Run) -> None:
    scaled = short_run("scaled", **ONE_STEP, embedding_lr_scale=0.25)
    assert learning_rates(scaled, 1e-3) == "linear layers 0.001, others 0.001 x 0.25 = 0.00025"
    whole, less = moved(short_run("whole", **ONE_STEP)), moved(scaled)
    assert len(whole) == 20
    for name, step in whole.items():
        share = 1.0 if "_proj" in name else 0.25
        torch.testing.assert_close(less[name], share * step, atol=3e-7, rtol=0)  # weights near 1 are rounded to 6e-8


def test_it_resumes_bit_for_bit(short_run: Run) -> None:
    config = short_run(method="adamw", embedding_lr_scale=0.25, save_total_limit=3, weight_decay=0.1)
    first = moved(config)
    (Path(config.output_dir) / "checkpoint-6" / "manifest.json").unlink()
    assert train(config, resume="auto").result["resumed_from_step"] == 4
    again = load_file(Path(config.output_dir) / "model" / "model.safetensors")
    before = load_file(Path(config.model_name_or_path) / "model.safetensors")
    assert all(torch.equal(first[name], again[name] - before[name]) for name in first)
    with pytest.raises(OptionError, match=r"embedding_lr_scale.*Resume with embedding_lr_scale=0.25"):
        train(dataclasses.replace(config, embedding_lr_scale=0.5), resume="auto")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "adamw"])
def test_other_methods_refuse_it_by_name(method: str, short_run: Run) -> None:
    way_out = "plain_lr_ratio" if METHODS[method].block == "galore" else "--method adamw"
    with pytest.raises(OptionError, match=way_out) as error:
        short_run(method=method, embedding_lr_scale=0.5)
    assert error.value.option == "embedding_lr_scale"


def test_shards_refuse_it_by_name(short_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("galore_trainer.hf.backend.training_backend", lambda *_: "fsdp")
    with pytest.raises(OptionError, match="DDP") as error:
        train(short_run(**ONE_STEP, embedding_lr_scale=0.5))
    assert error.value.option == "embedding_lr_scale"
