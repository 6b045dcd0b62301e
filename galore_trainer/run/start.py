"""Where a run starts: in a new folder, in one that is cleared, or from a checkpoint that its settings fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from galore_trainer.errors import OptionError
from galore_trainer.run.checkpoints import choose_checkpoint
from galore_trainer.run.config import BLOCKS, RESOLVED_CONFIG, RunConfig, load_run_config
from galore_trainer.run.methods import METHODS, check_resumable


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
    if resume and overwrite:
        raise OptionError("overwrite", True, "either --resume or --overwrite", "Both together make no sense.")
    if output.exists() and not output.is_dir():
        raise OptionError("output_dir", str(output), "a folder", "A file of this name exists: choose another.")
    taken = output.is_dir() and any(output.iterdir())
    if resume:
        check_resumable(config.method, resume)
        saved = output / RESOLVED_CONFIG
        if saved.is_file():
            _check_resumable(config, load_run_config(saved), say)
        checkpoint, notes = choose_checkpoint(resume, output)
        for note in notes:
            say(note)
        if checkpoint is not None:
            from galore_trainer.hf.unpickling import check_checkpoint

            check_checkpoint(checkpoint, "resume", best=config.training.get("load_best_model_at_end", False))
        return checkpoint
    if taken and not overwrite:
        raise OptionError(
            "output_dir", str(output), "an empty or new folder",
            "Go on with that run with --resume auto, replace it with --overwrite, or give another --output-dir.",
        )  # fmt: skip
    if taken and not (output / RESOLVED_CONFIG).is_file():
        raise OptionError("output_dir", str(output), "a run's folder, to overwrite it", "It holds other files.")
    return None


def _check_resumable(now: RunConfig, saved: RunConfig, say: Callable[[str], None]) -> None:
    """Refuse what would make saved state meaningless; tell of every other difference."""
    before, after = (_flat(c.to_dict()) for c in (saved, now))
    block = METHODS[now.method].block
    fields = dataclasses.fields(BLOCKS[block]) if block else ()
    fixed = {f"{block}.{field.name}" for field in fields if field.metadata["trajectory"]}
    fixed |= {"method", "model_name_or_path", "dtype", "seed"}
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
