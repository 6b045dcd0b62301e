"""Checkpoint folders of the Trainer, whichever backend wrote them: ``export_state`` makes them those of one process.

One process and DDP write ``optimizer.pt``, FSDP2 ``optimizer_0/`` or ``optimizer.bin``, DeepSpeed ``global_step*/``;
with ``save_only_model`` none of them is written.
"""

from __future__ import annotations

import contextlib
import pkgutil
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from galore_trainer.errors import OptionError
from galore_trainer.hf.backend import training_backend
from galore_trainer.hf.unpickling import OPTION, STORED_BY_DEEPSPEED, TRAINER, WHOLE, check_checkpoint, trainer_state
from galore_trainer.optim.param_groups import OTHER_LAYOUT, SLICES
from galore_trainer.optim.reshard import whole_of_names, whole_of_slices
from galore_trainer.targets.names import logical_name

OPTIMIZER, SCHEDULER, WEIGHTS = "optimizer.pt", "scheduler.pt", "model.safetensors"
WHOLE_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
OF_A_LAUNCH = re.compile(
    r"pytorch_model_fsdp.*|optimizer.*|latest|zero_to_.*|training_args\.bin|manifest\.json|scaler\.pt"
)
RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
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
    return "ddp" if (checkpoint / SCHEDULER).is_file() else "weights"  # with a scheduler there was an optimizer's file


def check_layout(checkpoint: str | Path, args: Any) -> None:
    """Raise ``OptionError`` where a Trainer could not resume a checkpoint: another launch's, or one of weights only.

    Args:
        checkpoint: the folder.
        args: the Trainer's ``TrainingArguments``.
    """
    folder = Path(checkpoint)
    now, written = str(training_backend(args)), str(written_by(folder))
    if written == "weights":
        raise OptionError("resume", str(checkpoint), "a checkpoint with the optimizer's state", WEIGHTS_ONLY)
    now = "ddp" if now == "single" else now
    if written == now == "deepspeed":
        stage3 = args.deepspeed_plugin.hf_ds_config.is_zero3()
        now = f"ZeRO-{'3' if stage3 else '1 or 2'} on {args.world_size}"
        processes = len(list(folder.glob("global_step*/*_optim_states.pt")))
        written = f"ZeRO-{'3' if _is_stage3(folder) else '1 or 2'} on {processes}"
    if written != now:
        way_out = OTHER_LAYOUT.replace("CHECKPOINT", str(checkpoint))
        raise OptionError("resume", f"{checkpoint}, under {now}", f"a run under {written}, which wrote it", way_out)


def lacks_state(args: Any, step: int) -> OptionError:
    """The error of a run that was resumed at a step without the optimizer's state, with the cause if it can be found.

    Args:
        args: the Trainer's ``TrainingArguments``, which do not tell what ``train(resume_from_checkpoint=...)`` got.
        step: at which it goes on.
    """
    named = getattr(args, "resume_from_checkpoint", None)
    places = [named if isinstance(named, str) else "", f"{args.output_dir}/checkpoint-{step}"]
    kind = next((written_by(Path(place)) for place in places if place and Path(place).is_dir()), None)
    either = f"If its folder has no optimizer.* and no global_step*: {WEIGHTS_ONLY} Else: {OTHER_LAYOUT}"
    way_out = {"weights": WEIGHTS_ONLY, "fsdp": OTHER_LAYOUT, "deepspeed": OTHER_LAYOUT}.get(str(kind), either)
    got = f"a run at step {step} whose optimizer has no state"
    return OptionError("resume_from_checkpoint", got, "a checkpoint with this launch's state", way_out)


def _is_stage3(checkpoint: Path) -> bool:
    return any(checkpoint.glob("global_step*/*zero_pp_rank_*_model_states.pt"))


def export_state(checkpoint: str | Path, output_dir: str | Path) -> Path:
    """Write a checkpoint as one process would have written it: by one process, without a launcher.

    Weights go to ``model.safetensors`` (DeepSpeed's float32 copies where it keeps some), the optimizer's state, whole
    and by parameter name, to ``optimizer.pt``; scheduler, Trainer state and random states are copied.

    Args:
        checkpoint: ``checkpoint-N`` of any backend.
        output_dir: gets a folder ``checkpoint-N``.

    Returns:
        The new folder, which ``resume_from_checkpoint`` takes on one process and under DDP.

    Raises:
        OptionError: no such checkpoint, files of it missing or of another optimizer, or the new folder exists.
    """
    source = Path(checkpoint).expanduser()
    step = check_whole_folder(source)
    target = Path(output_dir).expanduser() / f"checkpoint-{step}"
    if target.exists():
        raise OptionError("output_dir", str(output_dir), f"a folder without {target.name}", "Give another one.")
    read = {"deepspeed": _read_zero, "fsdp": _read_fsdp}.get(written_by(source), _read_whole)
    there = next(folder for folder in target.absolute().parents if folder.is_dir())  # large files may go there
    with _explained(source), tempfile.TemporaryDirectory(dir=there) as scratch:
        state, weights = read(source, Path(scratch))
    check_state(source, state)
    unfinished = target.with_name(f".{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for path in source.iterdir():
        replaced = OF_A_LAUNCH.fullmatch(path.name) or (weights is not None and WHOLE_WEIGHTS.fullmatch(path.name))
        if path.is_file() and not replaced:
            shutil.copyfile(path, unfinished / path.name)
    if weights is not None:
        from safetensors.torch import save_file

        save_file({name: w.contiguous() for name, w in weights.items()}, unfinished / WEIGHTS, {"format": "pt"})
    torch.save(state, unfinished / OPTIMIZER)
    _write_random_state(unfinished)
    unfinished.rename(target)
    return target


def check_whole_folder(checkpoint: Path) -> int:
    """The step of a checkpoint; ``OptionError`` where the folder is none, lacks a file, or is not safe to read."""
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
    """The step of a whole checkpoint; ``OptionError`` for any other, with the way to make it one."""
    step = check_whole_folder(Path(checkpoint).expanduser())
    if not (Path(checkpoint).expanduser() / OPTIMIZER).is_file():
        way_out = f"Make one: galore-ft state export {checkpoint} NEW_OUTPUT_DIR."
        raise OptionError(OPTION, str(checkpoint), f"a whole checkpoint, with {OPTIMIZER}", way_out)
    return step


def check_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Raise ``OptionError`` where an optimizer's state is none of ``GaLoreAdamW``'s, or an earlier version's."""
    if not all("matrices" in g for g in state["param_groups"] if g.get("projected", True)):
        raise OptionError(OPTION, str(checkpoint), "one whose optimizer was GaLoreAdamW, of this version")


@contextlib.contextmanager
def _explained(checkpoint: Path) -> Iterator[None]:
    """Turn a failure to read a file into an ``OptionError``; changed bytes can raise anything."""
    try:
        yield
    except OptionError:
        raise
    except (Exception, CheckpointException) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise OptionError(OPTION, str(checkpoint), WHOLE, reason) from error


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


# ------------------------------------------------------------------------------------------ by backend

Read = tuple[dict[str, Any], dict[str, Tensor] | None]
"""A state dict of one process, and the weights by the model's names; None where whole files of them are there."""


def _read_whole(checkpoint: Path, scratch: Path) -> Read:
    if not any(WHOLE_WEIGHTS.fullmatch(path.name) for path in checkpoint.iterdir()):
        raise FileNotFoundError(f"no {WEIGHTS}")
    return _load(checkpoint / OPTIMIZER), None


def _read_fsdp(checkpoint: Path, scratch: Path) -> Read:
    state = _read_either(checkpoint, "optimizer", scratch)
    weights = _read_either(checkpoint, "pytorch_model_fsdp", scratch)
    check_state(checkpoint, state)
    return whole_of_names(state), weights


def _read_either(checkpoint: Path, name: str, scratch: Path) -> Any:
    """A full state dict (a file) or a sharded one (a folder)."""
    if (checkpoint / f"{name}.bin").is_file():
        return _load(checkpoint / f"{name}.bin")
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(checkpoint / f"{name}_0", scratch / name)
    (inner,) = _load(scratch / name).values()
    return inner


def _read_zero(checkpoint: Path, scratch: Path) -> Read:
    folders = list(checkpoint.glob("global_step*"))
    latest = checkpoint / "latest"
    folder = checkpoint / latest.read_text().strip() if latest.is_file() else folders[0]
    if (folder / "zero").is_dir():
        raise OptionError(
            OPTION, str(checkpoint), "DeepSpeed's own checkpoint, of which export makes a whole one",
            "This is its universal format, which knows AdamW's moments alone and has lost the projection's.",
        )  # fmt: skip
    files = {m: path for path in folder.iterdir() if (m := RANK_FILE.fullmatch(path.name))}
    if not files or any(int(m[2]) for m in files):
        raise OptionError(OPTION, str(checkpoint), "DeepSpeed ZeRO-1, 2 or 3 without tensor parallelism")
    with torch.serialization.safe_globals([pkgutil.resolve_name(name) for name in STORED_BY_DEEPSPEED]):
        ordered = [_load(files[m])["optimizer_state_dict"] for m in sorted(files, key=lambda m: int(m[1]))]
    saved = [one.get("base_optimizer_state") or one["optimizer_state_dict"] for one in ordered]
    if any(not isinstance(one, dict) or SLICES not in one for one in saved):
        raise OptionError(OPTION, str(checkpoint), "one whose optimizer was GaLoreAdamW, of this version")
    flats = [one.get("single_partition_of_fp32_groups") or one["fp32_flat_groups"] for one in ordered]
    state, trained = whole_of_slices(saved, flats)
    return state, _with_trained(folder, trained)


def _with_trained(folder: Path, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model under its own names: trained ones, frozen ones and buffers; tied ones once."""
    stage3 = sorted(
        folder.glob("*zero_pp_rank_*_model_states.pt"), key=lambda path: int(path.name.split("_rank_")[1].split("_")[0])
    )
    files = stage3 or sorted(folder.glob("mp_rank_*_model_states.pt"))
    if not files:
        raise FileNotFoundError("no *_model_states.pt")
    parts = [_load(path) for path in files]
    found = dict(parts[0]["module"])
    for name, shape in (parts[0]["frozen_param_shapes"] or {}).items() if stage3 else ():
        fragments = torch.cat([part["frozen_param_fragments"][name].view(-1) for part in parts])
        found[name] = fragments[: shape.numel()].view(shape)
    for alias in parts[0]["shared_params"]:
        found.pop(alias, None)
    found = {name: trained.get(logical_name(name), weight) for name, weight in found.items()}
    return {name: weight for name, weight in found.items() if not (stage3 and weight.numel() == 0)}


def _write_random_state(folder: Path) -> None:
    """Give one process the random state of the first of several."""
    from transformers.trainer_pt_utils import safe_globals

    first, alone = folder / "rng_state_0.pth", folder / "rng_state.pth"
    if not first.is_file() or alone.is_file():
        return
    with safe_globals():
        states = torch.load(first, weights_only=True)
    devices = {k: v[0] for k, v in states.items() if isinstance(v, list) and v}  # each process keeps all of them
    torch.save({**states, **devices}, alone)
