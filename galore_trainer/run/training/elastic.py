"""Export and import of a checkpoint for another launch: one process makes it whole, the new processes shard it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from galore_trainer.errors import OptionError
from galore_trainer.run.files import check_writable
from galore_trainer.run.launching.checkpoints import MANIFEST, damage, seal

if TYPE_CHECKING:
    from galore_trainer.run.settings.run_config import RunConfig


def export_checkpoint(checkpoint: str, output_dir: str) -> Path:
    """``export_state`` for the checkpoint of a run or of a Trainer of one's own; the new one gets a manifest.

    Raises:
        OptionError: a damaged checkpoint, or anything ``export_state`` refuses.
    """
    from galore_trainer.hf.state_export import export_state

    _check(checkpoint)
    check_writable("OUTPUT_DIR", Path(output_dir).expanduser() / MANIFEST)
    target = export_state(checkpoint, output_dir)
    seal(target)
    return target


def import_checkpoint(config: RunConfig, checkpoint: str) -> Path:
    """``import_state`` for a run, in each of its processes; afterwards ``train(config, resume="auto")`` goes on.

    Args:
        config: of the run that goes on; its ``output_dir`` gets the checkpoint.
        checkpoint: a whole one.

    Raises:
        OptionError: a damaged checkpoint, a setting of the run that cannot be honoured, or anything ``import_state``
            refuses.
    """
    from galore_trainer.hf.state_import import import_state
    from galore_trainer.run.launching.distributed import is_main_process
    from galore_trainer.run.launching.start import own_folder
    from galore_trainer.run.training.train import prepare

    check_import(checkpoint)
    with own_folder(Path(config.output_dir).expanduser()) if is_main_process() else contextlib.nullcontext():
        prepared = prepare(config)
        target = import_state(prepared.trainer, checkpoint)
        if prepared.say.main:
            seal(target)
        prepared.trainer.accelerator.wait_for_everyone()
    return target


def check_import(checkpoint: str) -> None:
    """Raise ``OptionError`` for a checkpoint that ``import_checkpoint`` could not read, before anything is launched."""
    from galore_trainer.hf.checkpoints import check_importable

    check_importable(checkpoint)
    _check(checkpoint)


def _check(checkpoint: str) -> None:
    """Refuse a checkpoint that changed since it was sealed; only runs of ``galore-ft`` seal checkpoints."""
    folder = Path(checkpoint).expanduser()
    problem = damage(folder) if (folder / MANIFEST).is_file() else None
    if problem:
        raise OptionError("checkpoint", checkpoint, "a whole checkpoint", f"{problem[0].upper()}{problem[1:]}.")
