"""Training that has failed does not end well: weights, losses and models that are not finite are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from galore_trainer.errors import OptionError
from galore_trainer.run.launching.checkpoints import checkpoints, newest_whole
from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training.callbacks import TimingCallback
from galore_trainer.run.training.train import train

pytestmark = pytest.mark.usefixtures("short_end")
Run = Callable[..., RunConfig]
NAN, INF = float("nan"), float("inf")
NO_SCORES = {"data": {"source": "embedded:arithmetic", "train_samples": 40, "eval_samples": 0}}


def at_step(step: int, monkeypatch: pytest.MonkeyPatch, do: Callable[[Any, Any], None], *, last: int = 10**9) -> None:
    """Do something to model and optimizer before a step's update, in every step up to the last one."""
    real = TimingCallback.on_pre_optimizer_step

    def doing(own: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if step <= state.global_step + 1 <= last:
            do(kwargs["model"], kwargs["optimizer"])
        real(own, args, state, control, **kwargs)

    monkeypatch.setattr(TimingCallback, "on_pre_optimizer_step", doing)


def bad_gradient(model: Any, optimizer: Any) -> None:
    next(p for p in model.parameters() if p.requires_grad and p.grad is not None).grad.view(-1)[0] = NAN


@pytest.mark.parametrize("method", ["adamw", "lora"])
def test_one_bad_gradient_of_adamw_stops_the_run(method: str, short_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    config = short_run(method=method, save_steps=2, save_total_limit=1, **NO_SCORES)
    at_step(4, monkeypatch, bad_gradient, last=4)
    with pytest.raises(
        RuntimeError, match=r"weights were not finite after step 4: .*last good checkpoint is checkp.*-2"
    ):
        train(config)
    run = Path(config.output_dir)
    assert checkpoints(run) == [run / "checkpoint-2"]
    assert newest_whole(run) == run / "checkpoint-2"
    assert not (run / "result.json").exists()
    monkeypatch.undo()
    assert train(config, resume="auto").result["steps"] == 6


def test_galore_skips_a_bad_gradient_and_stops_after_ten(short_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(2, monkeypatch, bad_gradient, last=3)
    assert train(short_run("few", **NO_SCORES)).result["steps"] == 6
    monkeypatch.undo()
    at_step(2, monkeypatch, bad_gradient)
    with pytest.raises(RuntimeError, match="10 steps in a row"):
        train(short_run("many", max_steps=15, **NO_SCORES))


@pytest.mark.parametrize("last", [5, 10**9])
def test_losses_that_are_not_finite(
    last: int, short_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are shown, no checkpoint is kept of them, and training does not end with them; a single one may be."""
    from transformers import Trainer

    real = Trainer.training_step

    def training_step(trainer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = real(trainer, *args, **kwargs)
        return loss * NAN if 4 <= trainer.state.global_step + 1 <= last else loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    config = short_run(save_steps=1, save_total_limit=1, logging_steps=1, **NO_SCORES)
    if last == 5:
        assert train(config).result["steps"] == 6
        return
    with pytest.raises(RuntimeError, match=r"the loss was not finite in the last 3 steps.*checkpoint is checkpoint-3"):
        train(config)
    run = Path(config.output_dir)
    assert checkpoints(run) == [run / "checkpoint-3"]
    said = capsys.readouterr()
    assert "checkpoint-4 is not kept" in said.err
    assert "step 4/6  loss nan" in said.out
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(row["loss"] != row["loss"] for row in rows if row["step"] > 3 and "loss" in row)


@pytest.mark.parametrize("method", ["galore_plus", "adamw"])
def test_weights_that_grow_beyond_all_bounds_stop_the_run(method: str, short_run: Run) -> None:
    with pytest.raises(RuntimeError, match=r"training has failed: .*not finite"):
        train(short_run(method=method, weight_decay=1e30))


@pytest.mark.parametrize("value", [INF, NAN, "1e400"])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_setting_that_is_not_finite_is_refused(name: str, value: object, short_run: Run) -> None:
    with pytest.raises(OptionError, match=name):
        train(short_run(**{name: float(value)}))  # type: ignore[arg-type]


def test_a_log_that_hides_losses_is_refused(short_run: Run) -> None:
    with pytest.raises(OptionError, match="logging_nan_inf_filter"):
        train(short_run(logging_nan_inf_filter=True))


def changed(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_model_with_a_weight_that_is_not_finite_is_refused(
    short_run: Run, tiny_model_dir: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = changed(tiny_model_dir, tmp_path / "model", lambda weights: weights[name].view(-1)[5:6].fill_(NAN))
    with pytest.raises(OptionError, match=f"finite weights.*{name}"):
        train(short_run(model_name_or_path=str(model)))
    assert not (tmp_path / "run").exists()


def test_a_model_that_lacks_a_weight_is_refused(short_run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = changed(tiny_model_dir, tmp_path / "model", lambda weights: weights.pop(name))
    with pytest.raises(OptionError, match=f"all of its weights. Its files lack {name}"):
        train(short_run(model_name_or_path=str(model)))
