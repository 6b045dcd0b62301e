"""What a resumed run says of its schedule, of tied weights and of missing ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training.train import prepare, train

Run = Callable[..., RunConfig]
JUMP = "the schedule of the learning rate is rebuilt"


@pytest.mark.usefixtures("short_end")
@pytest.mark.parametrize(("method", "trainer"), [("galore_plus", "hf"), ("adamw", "hf"), ("galore_plus", "trl")])
def test_a_longer_resume_names_both_rates_and_no_tied_weight(
    method: str, trainer: str, short_run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    if trainer == "trl":
        pytest.importorskip("trl")
    settings = {
        "method": method,
        "trainer": trainer,
        "data": {"source": "embedded:arithmetic", "train_samples": 8, "eval_samples": 0},
    }
    train(short_run(max_steps=2, save_steps=1, **settings))
    with caplog.at_level(logging.WARNING):
        train(short_run(max_steps=2, save_steps=1, **settings), resume=str(run_folder(short_run) / "checkpoint-1"))
        assert not [text for text in caplog.messages if text.startswith(JUMP)]
        train(short_run(max_steps=4, save_steps=1, **settings), resume=str(run_folder(short_run) / "checkpoint-1"))
    told = [text for text in caplog.messages if text.startswith(JUMP)]
    assert told == [
        f"{JUMP} for max_steps 4 (the checkpoint's run: 2): after step 1 it gives 0.00075 where the checkpoint has "
        "0.0005; the first step takes the latter"
    ]
    assert not [text for text in caplog.messages if "missing keys" in text]


def run_folder(short_run: Run) -> Path:
    return Path(short_run().output_dir)


def test_a_weight_that_is_really_missing_is_named_alone(
    short_run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = prepare(short_run()).trainer
    trainer.save_model(str(tmp_path / "saved"))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # older versions print by themselves
    file = tmp_path / "saved" / "model.safetensors"
    weights = load_file(file)
    assert "lm_head.weight" not in weights  # it is tied
    lost = "model.norm.weight"
    save_file({name: w for name, w in weights.items() if name != lost}, file, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        trainer._load_from_checkpoint(str(tmp_path / "saved"))
    assert {text for text in caplog.messages if "missing keys" in text} == {
        f"There were missing keys in the checkpoint model loaded: ['{lost}']."
    }
