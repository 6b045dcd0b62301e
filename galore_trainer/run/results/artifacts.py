"""What a run leaves beside its model: a loss plot, and facts about the environment."""

from __future__ import annotations

import importlib.metadata
import io
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from galore_trainer.run.files import write_file

PACKAGES = (
    "galore-trainer",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "gguf",
    "trl",
    "peft",
    "bitsandbytes",
    "galore-torch",
)


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
