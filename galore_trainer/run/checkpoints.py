"""Checkpoints that can be trusted: each gets a manifest once it is whole, and resume takes the newest good one."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from galore_trainer.errors import OptionError
from galore_trainer.run.artifacts import write_json

MANIFEST = "manifest.json"
BLOCK = 1 << 22


def seal(checkpoint: Path) -> None:
    """Write size and CRC-32 of every file into the checkpoint's manifest, as its last file."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST)
    sums = {p.relative_to(checkpoint).as_posix(): [p.stat().st_size, _crc(p)] for p in files}
    write_json(checkpoint / MANIFEST, {"files": sums})


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole.

    A checkpoint without a manifest was still being written when its run ended.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, (size, crc) in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _crc(path) != crc:
                return f"{name} was changed after it was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was never finished"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=lambda p: -int(p.name.rsplit("-", 1)[1]))


def choose_checkpoint(resume: str, output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and what to tell the user.

    Args:
        resume: ``auto`` for the newest good checkpoint of the run (none at all starts from the beginning), or a path.
        output_dir: the run's folder.

    Raises:
        OptionError: a path that is no checkpoint, or a damaged one; only damaged ones under ``auto``.
    """
    if resume != "auto":
        path = Path(resume).expanduser()
        wrong = damage(path) if path.is_dir() else "there is no such folder"
        if wrong:
            way_out = f"{wrong[0].upper()}{wrong[1:]}. Use --resume auto for the newest good checkpoint."
            raise OptionError("resume", resume, "auto or a whole checkpoint-N folder", way_out)
        return path, [f"resuming from {path}"]
    notes: list[str] = []
    found = checkpoints(output_dir)
    for path in found:
        wrong = damage(path)
        if wrong is None:
            return path, [*notes, f"resuming from {path}"]
        notes.append(f"{path.name} is not used: {wrong}")
    if found:
        way_out = f"{'; '.join(notes)}. Start anew with --overwrite."
        raise OptionError("resume", "auto", "at least one whole checkpoint", way_out)
    return None, [f"no checkpoint in {output_dir} yet: starting from the beginning"]


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc
