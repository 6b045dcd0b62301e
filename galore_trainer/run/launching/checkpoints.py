"""Checkpoints: a manifest seals each one once it is complete, and resume takes the newest one without damage."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from galore_trainer.errors import OptionError
from galore_trainer.run.files import flush_folder, write_file

MANIFEST, STATE = "manifest.json", "trainer_state.json"
ASIDE = "aside"
"""The folder, inside a run's, of checkpoints that a run would have written over."""
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
BLOCK = 1 << 22


def seal(checkpoint: Path) -> None:
    """Write size and CRC-32 of every file into the checkpoint's manifest, as its last file.

    Files and folders are flushed to the disk first: after a power cut, too, a checkpoint with a manifest is whole.

    Raises:
        OSError: a file could not be read or flushed; there is no manifest.
    """
    paths = sorted(checkpoint.rglob("*"))
    manifest = checkpoint / MANIFEST
    files = [path for path in paths if path.is_file() and path != manifest]
    sums = {path.relative_to(checkpoint).as_posix(): [path.stat().st_size, _crc(path, flush=True)] for path in files}
    for folder in [*(path for path in paths if path.is_dir()), checkpoint, checkpoint.parent]:
        flush_folder(folder)
    write_file(manifest, json.dumps({"files": sums}, indent=2))  # no line end: no byte of it may be missing


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole.

    A checkpoint without a manifest was still being written when its run ended.
    """
    try:
        if not checkpoint.is_dir():
            return "it is no folder" if os.path.lexists(checkpoint) else "there is no such folder"
        if not os.path.lexists(checkpoint / MANIFEST):
            return f"it has no {MANIFEST}: it was never finished"
        files = _read_manifest(checkpoint / MANIFEST)
    except _Malformed as error:
        return f"its {MANIFEST} {error}"
    except (OSError, ValueError, RecursionError):
        return f"its {MANIFEST} cannot be read"
    problems = (_damage_of_file(checkpoint / name, name, size, crc) for name, (size, crc) in files.items())
    return next((problem for problem in problems if problem), None)


def is_sealed(checkpoint: Path) -> bool:
    """Whether a checkpoint was finished, by its manifest alone."""
    return (checkpoint / MANIFEST).is_file()


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def checkpoints(output_dir: Path) -> list[Path]:
    """Every path with a checkpoint's name in a run's folder, newest first; it may be damaged, or not a folder."""
    if not output_dir.is_dir():
        return []
    named = [output_dir / name for name in os.listdir(output_dir) if NAME.fullmatch(name)]
    return sorted(named, key=step_of, reverse=True)


def newest_whole(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run without damage."""
    return next((path for path in checkpoints(output_dir) if damage(path) is None), None)


def choose_checkpoint(resume: str, output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and what to tell the user.

    Args:
        resume: ``auto`` for the newest whole checkpoint of the run (None where there is none, so that the run starts
            from the beginning), or a path.
        output_dir: the run's folder.

    Raises:
        OptionError: a path that is no checkpoint, or a damaged one; a checkpoint without the optimizer's state.
    """
    if resume != "auto":
        path = Path(resume).expanduser()
        if problem := damage(path) or _misfit(path):
            way_out = f"{problem[0].upper()}{problem[1:]}. Use --resume auto for the newest good checkpoint."
            raise OptionError("resume", resume, "auto or a whole checkpoint-N folder", way_out)
        _require_state(resume, path)
        return path, [f"resuming from {path}"]
    notes: list[str] = []
    for path in checkpoints(output_dir):
        if problem := damage(path) or _misfit(path):
            notes.append(f"{path.name} is not used: {problem}")
            continue
        _require_state(resume, path)
        return path, [*notes, f"resuming from {path}"]
    which = "whole checkpoint" if notes else "checkpoint"
    return None, [*notes, f"no {which} in {output_dir}{'' if notes else ' yet'}: starting from the beginning"]


def make_way(output_dir: Path, start: Path | None) -> list[str]:
    """Set aside the checkpoints that a run would write over or, after a kill, take for its own.

    Args:
        output_dir: the run's folder.
        start: the checkpoint that the run goes on from; older ones beside it stay.

    Returns:
        What to tell the user.
    """
    in_this_run = start is not None and start.resolve().parent == output_dir.resolve() and NAME.fullmatch(start.name)
    notes = []
    for path in checkpoints(output_dir):
        if in_this_run and step_of(path) <= step_of(start):  # type: ignore[arg-type]
            continue
        target = output_dir / ASIDE / path.name
        remove(target)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        notes.append(f"{path.name} was moved to {ASIDE}/")
    return notes


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond ``limit``, as the Trainer does, once ``newest`` is sealed.

    The newest one and the best one always stay; unsealed ones are removed first. ``ASIDE`` may hold as many more.

    Args:
        newest: the checkpoint that was just sealed.
        limit: ``save_total_limit``; None or 0 keeps all.
        best: the Trainer's ``best_model_checkpoint``.
    """
    if not limit or limit < 0:
        return
    kept = {newest.name, *([Path(best).name] if best else [])}
    removable = [path for path in checkpoints(newest.parent) if path.name not in kept]
    sealed = [path for path in removable if is_sealed(path)]
    remaining = sealed[: max(limit - len(kept), 0)]
    aside = sorted(checkpoints(newest.parent / ASIDE), key=lambda path: path.lstat().st_mtime, reverse=True)
    for path in [*(path for path in removable if path not in remaining), *aside[limit:]]:
        remove(path)


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, whatever there is; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ what is in a checkpoint


class _Malformed(ValueError):
    """Says what is wrong with a manifest's content."""


def _read_manifest(path: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 by name.

    Raises:
        OSError, ValueError, RecursionError: it is no manifest, or lists no file.
    """
    if not path.is_file():  # a pipe would never end
        raise _Malformed("is no file")
    content = json.loads(path.read_text(encoding="utf-8"))
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise _Malformed("vouches for no file")
    for name, sums in files.items():
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise _Malformed(f"names {name!r}, which is outside")
        if not (isinstance(sums, list) and len(sums) == 2 and all(type(number) is int for number in sums)):
            raise _Malformed(f"has no size and sum of {name!r}")
    return {name: (size, crc) for name, (size, crc) in files.items()}


def _damage_of_file(path: Path, name: str, size: int, crc: int) -> str | None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is no file"
        if status.st_size != size:
            return f"{name} has {status.st_size} bytes instead of {size}"
        return f"{name} was changed after it was written" if _crc(path) != crc else None
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except ValueError:  # no file can have such a name
        return f"{name!r} is missing"


def saved_step(checkpoint: Path) -> int:
    """The step at which a checkpoint was saved; ``ValueError`` where that cannot be read."""
    try:
        state: Any = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        step = state["global_step"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"its {STATE} cannot be read") from None
    if type(step) is not int or step < 0:
        raise ValueError(f"its {STATE} says step {step!r}")
    return step


def _misfit(checkpoint: Path) -> str | None:
    """What is wrong with the step that an undamaged checkpoint states; None for nothing."""
    try:
        step = saved_step(checkpoint)
    except ValueError as error:
        return str(error)
    named = NAME.fullmatch(checkpoint.name)
    return f"its {STATE} says step {step}" if named and int(named[1]) != step else None


def _require_state(resume: str, checkpoint: Path) -> None:
    """Raise ``OptionError`` for a checkpoint that ``save_only_model`` left without the optimizer's state."""
    from galore_trainer.hf.checkpoints import WEIGHTS_ONLY, written_by

    if written_by(checkpoint) == "weights":
        got = resume if resume != "auto" else f"auto, which finds {checkpoint}"
        raise OptionError("resume", got, "a checkpoint with the optimizer's state", WEIGHTS_ONLY)


def _crc(path: Path, *, flush: bool = False) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
        if flush:
            os.fsync(file.fileno())
    return crc
