"""Figures of the projection reach every tracker, wherever the callback stands; skipped steps are told at the end."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, integration_utils

from galore_trainer import GaLoreCallback, build_optimizer, galore_plugin
from tiny_training import CONFIG, arguments, rows

FIGURES = {f"galore/{name}" for name in ("projection_error", "refresh_seconds", "update_seconds", "state_bytes")}


class Tracker(TrainerCallback):
    """Keeps every log as it finds it."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class Other(Tracker):
    """Another class, as a Trainer warns of two of one."""


class Writer:
    """A ``SummaryWriter`` that keeps scalars."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[float]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(name, []).append(value)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("way", ["plugin", "optimizers", "added"])
def test_every_tracker_gets_the_figures(way: str, tiny_llama: Any, tmp_path: Path, monkeypatch: Any) -> None:
    writer, before, after, late = Writer(), Tracker(), Other(), Tracker()
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    made = TensorBoardCallback.__init__

    def with_writer(self: Any, tb_writer: Any = None) -> None:
        made(self, writer)

    monkeypatch.setattr(TensorBoardCallback, "__init__", with_writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    args = arguments(tmp_path, report_to="tensorboard")
    ours: dict[str, Any] = galore_plugin(CONFIG, args)
    if way != "plugin":
        ours = {"optimizers": (build_optimizer(tiny_llama, CONFIG), None), "callbacks": [GaLoreCallback()]}
    ours["callbacks"] = [before, *(ours["callbacks"] if way != "added" else []), after]
    trainer = Trainer(tiny_llama, args, train_dataset=rows(), **ours)
    trainer.add_callback(late)
    if way == "added":
        trainer.add_callback(GaLoreCallback())
    trainer.train()
    for tracker in (before, after, late):
        seen = [log for log in tracker.logs if "loss" in log]
        assert len(seen) == 3
        assert all(log.keys() >= FIGURES for log in seen)
    assert {name.removeprefix("train/") for name, values in writer.scalars.items() if len(values) == 3} >= FIGURES
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["galore/projection_error"] for log in logged] == writer.scalars["train/galore/projection_error"]
    kinds = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert kinds.count("GaLoreCallback") == 1
    assert {"DefaultFlowCallback", "TensorBoardCallback", "Tracker", "Other", "PrinterCallback"} < set(kinds)


def test_every_callback_is_called_once_while_the_first_place_is_taken(tiny_llama: Any, tmp_path: Path) -> None:
    begun: list[str] = []

    class Begins(TrainerCallback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(self.name)

    optimizer = build_optimizer(tiny_llama, CONFIG)
    trainer = Trainer(tiny_llama, arguments(tmp_path, max_steps=1), train_dataset=rows(), optimizers=(optimizer, None))
    for callback in (Begins("a"), GaLoreCallback(), Begins("b"), Begins("c")):
        trainer.add_callback(callback)
    trainer.train()
    assert begun == ["a", "b", "c"]


def test_skipped_steps_are_told_where_nothing_was_logged(
    tiny_llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(tmp_path, logging_steps=100, max_grad_norm=0.0)

    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 1:
                model.get_parameter("model.norm.weight").grad[0] = float("nan")

    plugin = galore_plugin(CONFIG, args)
    plugin["callbacks"].append(Spoil())
    with caplog.at_level(logging.WARNING):
        Trainer(tiny_llama, args, train_dataset=rows(), **plugin).train()
    told = [record.getMessage() for record in caplog.records if "non-finite gradient" in record.getMessage()]
    assert len(told) == 1
    assert "model.norm.weight (1)" in told[0]
