"""A run in a process of its own that something happens to: ``fault_worker.py CASE.json``.

CASE holds ``config`` (of the run), ``resume``, and perhaps one of

- ``kill``: [point, step]: one of ``POINTS``, and the step that it belongs to;
- ``file_bytes``: the largest file that the system lets this process write;
- ``fill``: [file, step, bytes]: before this step's checkpoint the file grows until the disk has so many bytes left;
- ``slow``: seconds that every step after the second takes longer.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from transformers import Trainer
from transformers.trainer_callback import TrainerState

from galore_trainer.errors import OptionError
from galore_trainer.run.launching import checkpoints
from galore_trainer.run.memory import estimate
from galore_trainer.run.results import result as results
from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training import callbacks, train


def die() -> NoReturn:
    """As ``kill -9`` does it: nothing is flushed, closed or tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    raise AssertionError


def halve(folder: Any, *patterns: str) -> None:
    """Cut a file of one of these names to half its length, as if it were still being written."""
    path = next(path for pattern in patterns for path in sorted(Path(folder).glob(pattern)))
    os.truncate(path, path.stat().st_size // 2)


def halve_oldest(newest: Path) -> None:
    """Leave the oldest checkpoint without half of its files, as if it were still being removed."""
    files = sorted(file for file in checkpoints.checkpoints(newest.parent)[-1].rglob("*") if file.is_file())
    for file in files[: len(files) // 2]:
        file.unlink()


def saves(trainer: Any, folder: Any) -> int:
    """The step of the checkpoint that is written to; -1 for another folder."""
    return trainer.state.global_step if checkpoints.NAME.fullmatch(Path(folder).name) else -1


WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
POINTS: dict[str, tuple[Any, str, Callable[..., int | None], Callable[..., Any] | None]] = {
    # what is struck, the step it is at (None for any), what is done of it before the kill
    "forward": (Trainer, "training_step", lambda trainer, *_: trainer.state.global_step + 1, None),
    "update": (
        callbacks.TimingCallback,
        "on_optimizer_step",
        lambda _, args, state, *__, **___: state.global_step + 1,
        None,
    ),
    "before the save": (Trainer, "_save_checkpoint", lambda trainer, *_: trainer.state.global_step, None),
    "half of the weights": (
        Trainer,
        "save_model",
        lambda trainer, folder, **_: saves(trainer, folder),
        lambda real, *args, **more: (real(*args, **more), halve(args[1], *WEIGHTS)),
    ),
    "half of the optimizer": (
        Trainer,
        "_save_optimizer_and_scheduler",
        saves,
        lambda real, *args: (real(*args), halve(args[1], "optimizer*")),
    ),
    "before the trainer's state": (TrainerState, "save_to_json", lambda state, path: state.global_step, None),
    "before the manifest": (callbacks, "seal", checkpoints.step_of, None),
    "half of the manifest": (
        checkpoints,
        "write_file",
        lambda path, text: checkpoints.step_of(path.parent),
        lambda real, path, text: path.with_name(".manifest.json-0").write_text('{"files": {'),
    ),
    "before the rotation": (callbacks, "rotate", lambda newest, *_: checkpoints.step_of(newest), None),
    "half of the rotation": (
        callbacks,
        "rotate",
        lambda newest, *_: checkpoints.step_of(newest),
        lambda real, newest, *_: halve_oldest(newest),
    ),
    "after the rotation": (
        callbacks,
        "rotate",
        lambda newest, *_: checkpoints.step_of(newest),
        lambda real, *args: real(*args),
    ),
    "half of the model": (
        train,
        "save_whole_model",
        lambda *_: None,
        lambda real, *args: (real(*args), halve(args[1], WEIGHTS[0])),
    ),
    "before the result": (train, "write_artifacts", lambda *_: None, None),
    "checkpoints were moved aside": (train, "make_way", lambda *_: None, lambda real, *args: real(*args)),
    "the checkpoint was loaded": (
        Trainer,
        "_load_optimizer_and_scheduler",
        lambda *_: None,
        lambda real, *args: real(*args),
    ),
}


def strike(point: str, step: int | None) -> None:
    """Have a function kill this process once it is called at a step."""
    owner, name, step_at, first = POINTS[point]
    real = getattr(owner, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        if step_at(*args, **kwargs) not in (None, step):
            return real(*args, **kwargs)
        if first is not None:
            first(real, *args, **kwargs)
        die()

    setattr(owner, name, struck)


def slow_down(seconds: float) -> None:
    real: Any = Trainer.training_step

    def slow(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds if trainer.state.global_step >= 2 else 0)
        return real(trainer, *args, **kwargs)

    setattr(Trainer, "training_step", slow)  # noqa: B010


def fill(file: str, step: int, left: int) -> None:
    real: Any = Trainer._save_checkpoint

    def filling(trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == step:
            size = shutil.disk_usage(Path(file).parent).free - left
            Path(file).write_bytes(bytes(size))
        real(trainer, *args, **kwargs)

    setattr(Trainer, "_save_checkpoint", filling)  # noqa: B010


def main() -> int:
    case = json.loads(Path(sys.argv[1]).read_text())
    results.plot_losses = lambda *args, **more: None  # half of the time of so short a run
    estimate.predict = lambda *args: {"peak_bytes": None}
    if "kill" in case and os.environ.get("RANK", "0") == "0":
        strike(*case["kill"])
    if "file_bytes" in case:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["file_bytes"], resource.RLIM_INFINITY))
    if "fill" in case:
        fill(*case["fill"])
    if "slow" in case:
        slow_down(case["slow"])
    try:
        result = train.train(RunConfig.from_dict(case["config"]), resume=case["resume"])
    except (OptionError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    except KeyboardInterrupt:
        return 130
    return 130 if result.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
