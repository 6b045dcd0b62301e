"""What a run leaves beside its model: files written whole, a loss plot, facts about the environment."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from galore_trainer.errors import OptionError

PACKAGES = (
    "galore-trainer", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy",
    "gguf", "trl", "peft", "bitsandbytes", "galore-torch",
)  # fmt: skip


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all, text as UTF-8: no reader, crash or full disk ever meets half of it.

    Raises:
        OSError: nothing was written; the old content, if any, is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}-{uuid.uuid4().hex}"
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        flush_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Have a folder's entries written to the disk, so that what was renamed into it outlasts a power cut."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no such thing
            raise
    finally:
        os.close(number)


def check_writable(option: str, path: str | Path) -> None:
    """Refuse a file that could not be written after hours of work: a folder of its name, a place without permission.

    Args:
        option: that named the file, for the error.
        path: of a file that ``write_file`` is to write; nothing is left there.

    Raises:
        OptionError: with what the system says.
    """
    path, wanted = Path(path), "the path of a file that can be written"
    new: list[Path] = []
    try:
        if path.exists() and not path.is_file():
            raise FileExistsError("something else of this name exists")
        new = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:40]}-"):
            pass
    except (OSError, ValueError) as error:
        raise OptionError(option, str(path), wanted, f"{error}.") from None
    finally:
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def write_json(path: str | Path, value: Any) -> None:
    """Write standard JSON, indented, whole or not at all; numbers that JSON lacks (NaN, infinities) become null."""
    write_file(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, Any]:
    """Where a result was made, without names or paths of the machine.

    Returns:
        ``versions`` of Python and of the packages that are installed, ``platform``, ``device`` (the accelerator, else
        the processor), ``accelerators``, ``cores`` this process may use, ``commit`` of this package's own checkout and
        ``uncommitted_changes`` there (both None if it was installed from a wheel).
    """
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    accelerators = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "accelerators": accelerators,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **_checkout(Path(__file__).resolve().parents[3]),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _checkout(root: Path) -> dict[str, Any]:
    """Commit of the repository at ``root``; one above it, such as a user's project with a .venv, is not ours."""
    nothing = {"commit": None, "uncommitted_changes": None}
    if not (root / ".git").exists():
        return nothing

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, or a repository of another user
        return nothing


def plot_losses(path: str | Path, history: Sequence[Mapping[str, Any]], *, refresh_steps: Sequence[int] = ()) -> None:
    """Draw training and evaluation loss against the step into a PNG file.

    Args:
        history: ``trainer.state.log_history``: rows with ``step`` and ``loss`` or ``eval_loss``.
        refresh_steps: steps at which a projection was refreshed, marked by thin vertical lines.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, step in enumerate(refresh_steps):
        axes.axvline(
            step,
            color="0.8",
            linewidth=1,
            linestyle=":",
            zorder=0,
            label="refresh of the projection" if i == 0 else None,
        )
    train = _points(history, "loss")
    evaluation = _points(history, "eval_loss")
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training loss")
        axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label="training loss, smoothed")
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), color="tab:orange", marker="o", linewidth=2, label="evaluation loss")
    axes.set(xlabel="step", ylabel="cross entropy (nats per target token)", title="Loss")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if train or evaluation:
        axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_file(path, image.getvalue())


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[key])) for row in history if key in row and math.isfinite(float(row[key]))]


def smoothed(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average with bias correction."""
    average, smooth = 0.0, []
    for count, value in enumerate(values, start=1):
        average = decay * average + (1 - decay) * value
        smooth.append(average / (1 - decay**count))
    return smooth
