"""Checkpoint folders of the Trainer: which backend wrote one, and whether this launch can resume it.

One process and DDP write ``optimizer.pt``, FSDP2 ``optimizer_0/`` or ``optimizer.bin``, DeepSpeed ``global_step*/``;
with ``save_only_model`` none of them is written.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from galore_trainer.errors import OptionError
from galore_trainer.hf.backend import training_backend
from galore_trainer.hf.reading import OPTION, TRAINER, reading, trainer_state
from galore_trainer.hf.unpickling import check_checkpoint
from galore_trainer.optim.saved_groups import OTHER_LAYOUT, check_same_settings

OPTIMIZER, SCHEDULER, WEIGHTS = "optimizer.pt", "scheduler.pt", "model.safetensors"
WHOLE_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
"""Names of files that hold whole weights, or an index of them."""
SETTING = re.compile(r"optimizer\.param_groups\.(\d+)\.galore\.(\w+)(?:\.(.+))?", re.DOTALL)
"""Name of a setting of a projected group in a checkpoint of ``torch.distributed.checkpoint``: group, setting, and the
key of an entry where the setting is a mapping, as ``rank_pattern`` is."""
OURS = "one whose optimizer was GaLoreAdamW, of this version"
WEIGHTS_ONLY = (
    "It holds weights only (save_only_model), no state of an optimizer: start a new run from them "
    "(model_name_or_path: the checkpoint's folder, another output_dir, no resume)."
)


def written_by(checkpoint: Path) -> Literal["ddp", "fsdp", "deepspeed", "weights"]:
    """The kind of a checkpoint: of ``deepspeed``, of ``fsdp``, of ``ddp`` or one process, or ``weights`` only."""
    if any(checkpoint.glob("global_step*")):
        return "deepspeed"
    if (checkpoint / OPTIMIZER).is_file():
        return "ddp"
    if any(checkpoint.glob("optimizer*")):
        return "fsdp"
    # the scheduler is saved with the optimizer: here the optimizer's file is lost, and its absence is reported later
    return "ddp" if (checkpoint / SCHEDULER).is_file() else "weights"


def check_layout(checkpoint: str | Path, args: Any) -> None:
    """Raise ``OptionError`` where this launch cannot resume a checkpoint: another launch's, or one of weights only.

    Args:
        checkpoint: the folder.
        args: the Trainer's ``TrainingArguments``.
    """
    folder = Path(checkpoint)
    now, written = str(training_backend(args)), str(written_by(folder))
    if written == "weights":
        raise OptionError("resume", str(checkpoint), "a checkpoint with the optimizer's state", WEIGHTS_ONLY)
    now = "ddp" if now == "single" else now  # both write and read the same files
    if written == now == "deepspeed":  # its files depend on the stage and on the number of processes
        stage3 = args.deepspeed_plugin.hf_ds_config.is_zero3()
        now = f"ZeRO-{'3' if stage3 else '1 or 2'} on {args.world_size}"
        processes = len(list(folder.glob("global_step*/*_optim_states.pt")))
        written = f"ZeRO-{'3' if _is_stage3(folder) else '1 or 2'} on {processes}"
    if written != now:
        way_out = OTHER_LAYOUT.replace("CHECKPOINT", str(checkpoint))
        raise OptionError("resume", f"{checkpoint}, under {now}", f"a run under {written}, which wrote it", way_out)


def check_resumable(checkpoint: str, args: Any) -> None:
    """Raise ``OptionError`` for a checkpoint that this launch cannot resume, or that could run code; see the parts.

    Args:
        checkpoint: a folder; another path is left to the Trainer.
        args: the Trainer's ``TrainingArguments``.
    """
    if Path(checkpoint).is_dir():
        check_layout(checkpoint, args)
        check_checkpoint(checkpoint, "resume_from_checkpoint")


def lacks_state(args: Any, step: int) -> OptionError:
    """The error for a run that was resumed without the optimizer's state, with the cause if it is known.

    Args:
        args: the Trainer's ``TrainingArguments``. They do not contain the argument of
            ``train(resume_from_checkpoint=...)``, so the folder of this step in ``output_dir`` is looked at too.
        step: the step at which the run continues.
    """
    named = getattr(args, "resume_from_checkpoint", None)
    places = [named if isinstance(named, str) else "", f"{args.output_dir}/checkpoint-{step}"]
    kind = next((written_by(Path(place)) for place in places if place and Path(place).is_dir()), None)
    either = f"If its folder has no optimizer.* and no global_step*: {WEIGHTS_ONLY} Else: {OTHER_LAYOUT}"
    way_out = {"weights": WEIGHTS_ONLY, "fsdp": OTHER_LAYOUT, "deepspeed": OTHER_LAYOUT}.get(str(kind), either)
    got = f"a run at step {step} whose optimizer has no state"
    return OptionError("resume_from_checkpoint", got, "a checkpoint with this launch's state", way_out)


def resumed_from() -> Path | None:
    """The checkpoint that the calling Trainer goes on from; read from the stack, as its arguments do not hold it."""
    from transformers import Trainer

    frame = sys._getframe(1)
    while frame is not None:
        values = frame.f_locals
        checkpoint = values.get("resume_from_checkpoint")
        if isinstance(values.get("self"), Trainer) and isinstance(checkpoint, str | PathLike):
            return Path(checkpoint)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def check_settings_of_fsdp(checkpoint: Path, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ``OptionError`` for a checkpoint of FSDP2 that was trained under other settings than an optimizer's groups.

    ``torch.distributed.checkpoint`` would stop earlier than the optimizer, at the first tensor that the checkpoint
    lacks, without a word of the setting that asks for it.

    Args:
        checkpoint: the folder; one of another kind is left alone.
        groups: of the optimizer that is to load it.
    """
    folder = checkpoint / f"{OPTIMIZER.removesuffix('.pt')}_0"
    if not (folder / ".metadata").is_file():
        return
    check_checkpoint(checkpoint, "resume_from_checkpoint", best=False)
    from torch.distributed.checkpoint import FileSystemReader, load

    with reading(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it reads in one process
        reader = FileSystemReader(folder)
        found = map(SETTING.fullmatch, reader.read_metadata().state_dict_metadata)
        keys = {match[0]: match.groups() for match in found if match}
        values: dict[str, Any] = dict.fromkeys(keys)
        load(values, storage_reader=reader, no_dist=True)
    saved: dict[str, dict[str, Any]] = {}
    for key, (number, name, entry) in keys.items():
        settings = saved.setdefault(number, {})
        if entry is None:
            settings[name] = values[key]
        else:
            settings.setdefault(name, {})[entry] = values[key]
    check_same_settings([{"galore": saved[number]} for number in sorted(saved, key=int)], groups)


def saved_steps() -> int | None:
    """``max_steps`` of the run whose checkpoint the calling Trainer goes on from; None where it is not known."""
    checkpoint = resumed_from()
    if checkpoint is None or not (checkpoint / TRAINER).is_file():
        return None
    return trainer_state(checkpoint).get("max_steps")


def _is_stage3(checkpoint: Path) -> bool:
    return any(checkpoint.glob("global_step*/*zero_pp_rank_*_model_states.pt"))


def check_whole_folder(checkpoint: Path) -> int:
    """The step of a checkpoint of any backend.

    Raises:
        OptionError: there is no such folder, a file is missing, or a file is not safe to read.
    """
    if not checkpoint.is_dir():
        raise OptionError(OPTION, str(checkpoint), "the folder checkpoint-N of a run", "There is no such folder.")
    if (checkpoint / TRAINER).is_file() and written_by(checkpoint) == "weights":
        raise OptionError(OPTION, str(checkpoint), "a checkpoint with the optimizer's state", WEIGHTS_ONLY)
    missing = [name for name in (TRAINER, SCHEDULER) if not (checkpoint / name).is_file()]
    if missing:
        way_out = f"It has no {' and no '.join(missing)}."
        raise OptionError(OPTION, str(checkpoint), "a checkpoint-N with its scheduler, written by the Trainer", way_out)
    check_checkpoint(checkpoint, best=False)
    return trainer_state(checkpoint)["global_step"]


def check_importable(checkpoint: str | Path) -> int:
    """The step of a checkpoint of one process or DDP, which ``import_state`` takes.

    Raises:
        OptionError: any other checkpoint; the way out says how to convert it.
    """
    step = check_whole_folder(Path(checkpoint).expanduser())
    if not (Path(checkpoint).expanduser() / OPTIMIZER).is_file():
        way_out = f"Make one: galore-ft state export {checkpoint} NEW_OUTPUT_DIR."
        raise OptionError(OPTION, str(checkpoint), f"a whole checkpoint, with {OPTIMIZER}", way_out)
    return step


def check_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Raise ``OptionError`` where an optimizer's state is not one of ``GaLoreAdamW``, or of an earlier version."""
    if not all("matrices" in g for g in state["param_groups"] if g.get("projected", True)):
        raise OptionError(OPTION, str(checkpoint), OURS)
