"""What is installed, what this machine can do, what is missing and the command that gets it."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from galore_trainer.errors import OptionError
from galore_trainer.versions import DISTRIBUTION, fits, install_command, misfits, requirements, version

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "trl",
    "peft",
    "deepspeed",
    "bitsandbytes",
    "gguf",
    "galore-torch",
)


def examine() -> dict[str, Any]:
    """Collect the report: versions, machine, extras, embedded model, hub. Takes a few seconds, changes nothing."""
    return {
        "galore-trainer": version(DISTRIBUTION),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "too_old": {name: install_command({name: wanted}) for name, wanted in misfits().items()},
        "machine": machine(),
        "missing_extras": missing_extras(),
        "embedded_model": embedded_model(),
        "hub": hub(),
    }


def machine() -> dict[str, Any]:
    """Device, native bfloat16, cores this process may use, memory and free disk space in GiB."""
    from galore_trainer.run.device import device_type, uses_bf16
    from galore_trainer.run.models.model import cache_dir
    from galore_trainer.run.results.artifacts import environment

    facts = environment()
    count = facts["accelerators"]
    return {
        "platform": facts["platform"],
        "device": f"{count} x {facts['device']}" if count > 1 else facts["device"],
        "bf16": uses_bf16("auto", device_type()),
        "cores": facts["cores"],
        "memory_gib": _memory(),
        "disk_free_gib": {str(path): _free(path) for path in dict.fromkeys((Path.cwd(), cache_dir()))},
    }


def missing_extras() -> dict[str, str]:
    """The extras that are not whole, each with the command that installs what it lacks."""
    missing = {
        extra: {name: wanted for name, wanted in packages.items() if not fits(version(name), wanted)}
        for extra, packages in requirements().items()
        if extra not in ("", "dev")
    }
    return {extra: install_command(packages) for extra, packages in missing.items() if packages}


def embedded_model() -> dict[str, Any]:
    """Whether the embedded model is at hand, and the way to get it where it is not."""
    from galore_trainer.run.models.model import cache_dir, find_embedded_gguf

    converted = cache_dir() / "smollm2-135m"
    if (converted / "config.json").is_file():
        return {"present": True, "where": str(converted)}
    try:
        return {"present": True, "where": str(find_embedded_gguf())}
    except OptionError as error:
        return {"present": False, "way_out": error.way_out}


def hub() -> dict[str, Any]:
    """Whether the hub answers within its time limit of a few seconds."""
    from huggingface_hub import constants

    from galore_trainer.hub import probe

    problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else probe(constants.ENDPOINT)
    return {"endpoint": constants.ENDPOINT, "reachable": problem is None, "problem": problem}


def render(report: dict[str, Any]) -> str:
    """The report as aligned text lines."""
    machine, model, net = report["machine"], report["embedded_model"], report["hub"]
    lines = [
        (DISTRIBUTION, report["galore-trainer"] or "not installed"),
        ("python", report["python"]),
        *((name, installed or "not installed") for name, installed in report["packages"].items()),
        ("platform", machine["platform"]),
        ("device", machine["device"]),
        ("bf16", "native" if machine["bf16"] else "not native: 'bf16: auto' trains in float32"),
        ("cores", str(machine["cores"])),
        ("memory", "unknown" if machine["memory_gib"] is None else f"{machine['memory_gib']:g} GiB"),
        *(("disk free", f"{free:g} GiB at {path}") for path, free in machine["disk_free_gib"].items()),
        ("embedded model", model["where"] if model["present"] else f"missing. {model['way_out']}"),
        ("hub", f"{net['endpoint']} {'answers' if net['reachable'] else 'cannot be used: ' + str(net['problem'])}"),
        *((name, f"too old: {command}") for name, command in report["too_old"].items()),
        *((f"extra [{name}]", f"missing: {command}") for name, command in report["missing_extras"].items()),
    ]
    # Not a table of rich's, which would fold commands and paths that are to be copied.
    return "\n".join(f"{name:<18}{text}" for name, text in lines)


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _free(path: Path) -> float:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return round(shutil.disk_usage(existing).free / 2**30, 1)
