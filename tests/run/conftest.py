"""A tiny base configuration for studies, and runs that are started in this process instead of one of their own."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import yaml

from galore_trainer.run.settings.run_config import RunConfig


@pytest.fixture(autouse=True)
def brief_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs neither count their memory beforehand nor draw their losses, which takes half of a tiny run's time.

    A module that looks at either has a fixture of this name of its own, or a run of the module's scope.
    """
    monkeypatch.setattr(
        "galore_trainer.run.memory.estimate.predict", lambda *_: {"peak_bytes": None, "note": "not counted"}
    )
    monkeypatch.setattr("galore_trainer.run.results.result.plot_losses", lambda path, *_, **__: path.touch())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports whose text alone is looked at: nothing is drawn into their plots' files."""
    from galore_trainer.run.report.plots import Plot

    export = "galore_trainer.run.report.plots._export"
    monkeypatch.setattr(export, lambda name, figure, alt: Plot(name=name, alt=alt, svg="", png=b""))


@pytest.fixture
def tiny_base(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A configuration of a few steps with the tiny Llama."""
    settings = {
        "model_name_or_path": str(tiny_model_dir),
        "max_length": 400,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "galore": {"rank": 4, "update_proj_gap": 2, "residual_warmup_steps": 1},
        "data": {"source": "embedded:arithmetic", "train_samples": 40, "eval_samples": 4},
        "eval": {"max_new_tokens": 4},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs of a sweep happen in this process, one after the other; returns their command lines."""
    from galore_trainer.cli.main import main
    from galore_trainer.run.study import sweep as ablate

    commands: list[list[str]] = []

    def start(command: list[str], log: IO[bytes], environment: dict[str, str]) -> Any:
        commands.append(command[3:])
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(command[3:])
        log.write(said.getvalue().encode())
        return SimpleNamespace(poll=lambda: code, returncode=code)

    monkeypatch.setattr(ablate, "start_process", start)
    monkeypatch.setattr(ablate, "POLL_SECONDS", 0.0)
    return commands


@pytest.fixture
def make_study(tiny_base: Path, tmp_path: Path) -> Callable[..., Any]:
    """Write and load a study over the tiny base: grid, further keys, overrides."""
    from galore_trainer.run.study.grid import load_study

    def make(grid: dict[str, list[Any]], *overrides: str, **keys: Any) -> Any:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({"base": str(tiny_base), "grid": grid, "seeds": [0], **keys}, sort_keys=False))
        return load_study(path, overrides)

    return make


@pytest.fixture
def short_run(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """``short_run("name", key=value, ...)``: six steps in a folder of that name, with these settings above."""

    def configure(name: str = "run", **more: object) -> RunConfig:
        settings = {
            "model_name_or_path": str(tiny_model_dir),
            "output_dir": str(tmp_path / name),
            "max_length": 400,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 4,
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 5,
            "galore": {"rank": 4, "update_proj_gap": 2},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"source": "embedded:arithmetic", "train_samples": 40, "eval_samples": 4},
            "eval": {"max_new_tokens": 4, "before": False},
        }
        return RunConfig.from_dict({**settings, **more})

    return configure


@pytest.fixture
def short_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process neither count their memory nor draw a plot at the end."""
    monkeypatch.setattr("galore_trainer.run.memory.estimate.predict", lambda *args: {"peak_bytes": None})
    monkeypatch.setattr("galore_trainer.run.results.result.plot_losses", lambda *args, **more: None)
