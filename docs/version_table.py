"""docs/support-matrix.md: the versions that are accepted, and those that were tested."""

from __future__ import annotations

import json
import re
from pathlib import Path

from blocks import table

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "trl", "peft", "bitsandbytes", "deepspeed")


def versions() -> str:
    """The block ``versions``: from pyproject.toml, constraints.txt and the runs on GPUs in results/."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    python = re.search(r'requires-python = ">=([\d.]+)"', project)
    newest = re.findall(r"Python :: (3\.\d+)", project)
    gpu = on_gpus()
    rows = [("Python", python[1] if python else "", ", ".join(newest), listed(gpu.get("python", set())))]
    for name in PACKAGES:
        oldest = re.search(rf'"{name}>=([\d.]+)["; ]', project)
        pinned = re.findall(rf"^{name}==([^;\s]+)", pins, re.M)
        rows.append((name, oldest[1] if oldest else "", listed(set(pinned)), listed(gpu.get(name, set()))))
    return table([("package", "oldest, `make oldest`", "newest, `make check`", "on GPUs"), *rows])


def on_gpus() -> dict[str, set[str]]:
    """Package -> the versions that runs of results/ on NVIDIA GPUs had."""
    used: dict[str, set[str]] = {}
    for file in (ROOT / "results").glob("*/runs.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            environment = json.loads(line).get("environment", {})
            if environment.get("device", "").startswith("NVIDIA"):
                for name, version in environment["versions"].items():
                    used.setdefault(name, set()).add(version)
    return used


def listed(versions: set[str]) -> str:
    """Versions in their order, or ``-``."""
    return ", ".join(sorted(versions, key=lambda v: [int(n) for n in re.findall(r"\d+", v)])) or "-"
