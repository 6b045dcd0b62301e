"""Where a run starts: in a new folder, in one that is cleared, or from a checkpoint that its settings fit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from galore_trainer.errors import OptionError
from galore_trainer.run.launching.checkpoints import choose_checkpoint
from galore_trainer.run.settings.methods import METHODS, check_resumable
from galore_trainer.run.settings.run_config import BLOCKS, RESOLVED_CONFIG, RunConfig, load_run_config

LOCK = ".run.lock"


@contextlib.contextmanager
def own_folder(output: Path) -> Iterator[None]:
    """Lock a run's folder against other runs; the lock ends with the process, even where that is killed.

    A folder in which nothing was written is removed afterwards, and the lock of one that no run began in.

    Raises:
        OptionError: another run works there, or nothing can be written there.
    """
    from filelock import FileLock, Timeout

    check_folder(output)
    new_folders = [folder for folder in (output, *output.parents) if not folder.exists()]
    new = not (output / LOCK).exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / LOCK).acquire(timeout=0)
    except Timeout:
        raise OptionError(
            "output_dir",
            str(output),
            "a folder that no other run works in",
            "Wait until that run has ended, or give another --output-dir.",
        ) from None
    except OSError as error:
        raise OptionError("output_dir", str(output), "a folder to write in", f"{error.strerror}.") from error
    try:
        with lock:
            yield
    finally:
        if new and not (output / RESOLVED_CONFIG).is_file():
            (output / LOCK).unlink(missing_ok=True)
        if new_folders and not is_taken(output):
            (output / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # parents that other runs use
                for folder in new_folders:
                    folder.rmdir()


def check_folder(output: Path) -> None:
    """Raise ``OptionError`` where a run's folder, or a folder above it, is a file."""
    first = next(folder for folder in (output, *output.parents) if folder.exists() or folder.is_symlink())
    if not first.is_dir():
        raise OptionError("output_dir", str(output), "a folder", f"{first} is none: choose another.")


def is_taken(output: Path) -> bool:
    """Whether a run's folder holds anything."""
    return output.is_dir() and any(path.name != LOCK for path in output.iterdir())


def choose_start(
    config: RunConfig, resume: str | None, overwrite: bool, say: Callable[[str], None] = lambda text: None
) -> Path | None:
    """The checkpoint a run goes on from, None for a new run; changes nothing on disk.

    Args:
        config: of the run.
        resume: ``auto``, a checkpoint's folder, or None.
        overwrite: whether an earlier run may be in the way.
        say: takes one line for the user.

    Raises:
        OptionError: a folder that is taken, a checkpoint that is missing or does not fit the configuration.
    """
    output = Path(config.output_dir).expanduser()
    if resume is not None and overwrite:
        raise OptionError("overwrite", True, "either --resume or --overwrite", "Both together make no sense.")
    check_folder(output)
    taken = is_taken(output)
    if resume is not None:
        if not resume:
            raise OptionError("resume", resume, "auto or a checkpoint-N folder")
        check_resumable(config.method, resume)
        saved = output / RESOLVED_CONFIG
        if saved.is_file() and (began := _read_saved(saved, resume, say)):
            _check_resumable(config, began, say)
        checkpoint, notes = choose_checkpoint(resume, output)
        for note in notes:
            say(note)
        if checkpoint is not None:
            from galore_trainer.hf.unpickling import check_checkpoint

            check_checkpoint(checkpoint, "resume", best=config.training.get("load_best_model_at_end", False))
        return checkpoint
    if taken and not overwrite:
        raise OptionError(
            "output_dir",
            str(output),
            "an empty or new folder",
            "Go on with that run with --resume auto, replace it with --overwrite, or give another --output-dir.",
        )
    if taken and not (output / RESOLVED_CONFIG).is_file():
        raise OptionError("output_dir", str(output), "a run's folder, to overwrite it", "It holds other files.")
    return None


def _read_saved(saved: Path, resume: str, say: Callable[[str], None]) -> RunConfig | None:
    """The configuration that a run began with; None, after a message, where ``auto`` goes on without it."""
    try:
        return load_run_config(saved)
    except OptionError as error:
        if resume != "auto":
            raise
        say(f"{saved.name} is not compared with this run's settings, as it cannot be read: {error}")
        return None


def _check_resumable(current: RunConfig, saved: RunConfig, say: Callable[[str], None]) -> None:
    """Refuse a difference under which saved state has no meaning; report every other difference."""
    before, after = (_flat(c.to_dict()) for c in (saved, current))
    block = METHODS[current.method].block
    fields = dataclasses.fields(BLOCKS[block]) if block else ()
    fixed = {f"{block}.{field.name}" for field in fields if field.metadata["trajectory"]}
    fixed |= {"method", "model_name_or_path", "dtype", "seed", "embedding_lr_scale"}
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old == new or key == "output_dir" or key.startswith("methods."):
            continue
        if key in fixed:
            way_out = f"Resume with {key}={old}, or start another run (--output-dir)."
            raise OptionError(key, new, f"{old!r}, with which the run began", way_out)
        say(f"note: {key} was {old!r} when the run began and is {new!r} now")


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in data.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value})
    return flat
