"""What a run needs at its end is asked for at its start, and by a dry run."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from galore_trainer.cli.main import main
from galore_trainer.errors import OptionError
from galore_trainer.run.launching import preflight
from galore_trainer.run.launching.preflight import check_all, check_room, check_trackers, checkpoint_bytes
from galore_trainer.run.settings.arguments import run_arguments
from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training.train import prepare

Run = Callable[..., RunConfig]


def dry_run(config: RunConfig, folder: Path, *words: str) -> int:
    path = folder / "run.yaml"
    path.write_text(config.to_yaml())
    return main(["train", str(path), "--dry-run", *words])


def test_a_run_that_has_everything_passes(short_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(short_run(), tmp_path) == 0
    assert "6 steps of 2 examples each" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"model_name_or_path": "./nowhere"}, "model_name_or_path"),
        ({"galore": {"rank": 4000}}, "galore.rank"),
        ({"galore": {"rank": 4, "target_modules": ["no_such_layer"]}}, "galore.target_modules"),
        ({"method": "lora", "lora": {"rank": 4, "target_modules": ["no_such_layer"]}}, "lora.target_modules"),
        ({"report_to": "no_such_tracker"}, "report_to"),
        ({"report_to": "neptune"}, "report_to"),
    ],
)
def test_what_is_missing_is_found_by_a_dry_run_and_by_training(
    settings: dict[str, Any], option: str, short_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "lora" in settings:
        pytest.importorskip("peft")
    config = short_run(**settings)
    assert dry_run(config, tmp_path) == 2
    assert f"Error: {option}: got" in capsys.readouterr().err
    with pytest.raises(OptionError) as error:
        prepare(config)
    assert error.value.option == option


def test_a_tracker_that_wants_a_login_is_asked_for_it(short_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def login() -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=login))
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["wandb"])
    monkeypatch.setattr("transformers.integrations.get_reporting_integration_callbacks", lambda names: [])
    arguments: Any = SimpleNamespace(report_to=["wandb"])
    with pytest.raises(OptionError, match=r"api_key not configured.*report_to=none"):
        check_trackers(arguments)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(arguments)


def test_a_folder_that_cannot_be_written_is_refused(
    short_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    config = short_run("file/run")
    for look in (check_all, prepare):
        with pytest.raises(OptionError, match=r"output_dir.*is none: choose another"):
            look(config)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # the superuser may write anywhere
    with pytest.raises(OptionError, match="Nothing can be written in"):
        check_all(short_run())


@pytest.mark.parametrize("method", ["galore_plus", "adamw", "lora"])
def test_a_checkpoint_takes_about_what_was_counted(method: str, short_run: Run, tmp_path: Path) -> None:
    from galore_trainer.run.training.train import train

    if method == "lora":
        pytest.importorskip("peft")
    config = short_run(
        method=method, lora={"rank": 32}, data={"source": "embedded:arithmetic", "train_samples": 8, "eval_samples": 0}
    )
    counted, whole = checkpoint_bytes(config, preflight._model(config, run_arguments(config)))
    train(config)
    files = {path.name: path.stat().st_size for path in (tmp_path / "run" / "checkpoint-6").iterdir()}
    real = sum(size for name, size in files.items() if name.endswith("model.safetensors") or name == "optimizer.pt")
    assert counted == pytest.approx(real, rel=0.15)  # names and shapes, of a model so small
    ends = [path.stat().st_size for path in (tmp_path / "run").glob("*[lr]/*model.safetensors")]  # model/, adapter/
    assert whole == pytest.approx(sum(ends), rel=0.05)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"save_steps": 2, "max_steps": 10}, 3),
        ({"save_steps": 2, "max_steps": 10, "save_total_limit": 1}, 2),
        ({"save_steps": 2, "max_steps": 9, "save_total_limit": None}, 5),
        ({"save_steps": 0.25, "max_steps": 9, "save_total_limit": None}, 3),
        ({"save_strategy": "no", "max_steps": 10}, 0),
        ({"save_strategy": "epoch", "max_steps": 25, "save_total_limit": None}, 2),
    ],
)
def test_a_disk_has_room_for_what_is_kept_and_one_more(
    settings: dict[str, Any], count: int, short_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short_run(**settings)
    monkeypatch.setattr(preflight, "checkpoint_bytes", lambda *args, **more: (1000, 10))
    needed = count * 1000 + 10
    for free in (needed - 1, needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if free == needed:
            check_room(config, run_arguments(config), None, 40)
        else:
            with pytest.raises(OptionError, match=f"output_dir.*room for .*: {count} checkpoints"):
                check_room(config, run_arguments(config), None, 40)


def test_a_dry_run_tells_what_would_be_resumed(
    short_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(short_run(), tmp_path, "--resume", "auto") == 0
    assert "starting from the beginning" in capsys.readouterr().out
    assert dry_run(short_run(), tmp_path, "--resume", "") == 2
    assert dry_run(short_run(), tmp_path, "--resume", str(tmp_path)) == 2
