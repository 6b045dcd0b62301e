"""``export_state``: a checkpoint of any backend becomes one of a single process, which one process and DDP resume."""

from __future__ import annotations

import pkgutil
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from galore_trainer.errors import OptionError
from galore_trainer.hf.checkpoints import (
    OPTIMIZER,
    OURS,
    WEIGHTS,
    WHOLE_WEIGHTS,
    check_state,
    check_whole_folder,
    written_by,
)
from galore_trainer.hf.reading import OPTION, load_tensors, reading
from galore_trainer.hf.unpickling import STORED_BY_DEEPSPEED
from galore_trainer.optim.param_groups import SLICES
from galore_trainer.optim.reshard import whole_of_names, whole_of_slices
from galore_trainer.targets.names import logical_name

OF_A_LAUNCH = re.compile(
    r"pytorch_model_fsdp.*|optimizer.*|latest|zero_to_.*|training_args\.bin|manifest\.json|scaler\.pt"
)
"""Names of files that describe the launch which wrote them; they are not copied."""
RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def export_state(checkpoint: str | Path, output_dir: str | Path) -> Path:
    """Write a checkpoint as one process would have written it. Call it in one process, without a launcher.

    Weights go to ``model.safetensors`` (under DeepSpeed the float32 copies where it keeps some), the optimizer's state,
    whole and by parameter name, to ``optimizer.pt``; scheduler, Trainer state and random states are copied.

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
    # scratch files are as large as the checkpoint, so they go to the disk that is to hold the new one
    parent = next(folder for folder in target.absolute().parents if folder.is_dir())
    with reading(source), tempfile.TemporaryDirectory(dir=parent) as scratch:
        state, weights = read(source, Path(scratch))
    check_state(source, state)
    # renamed at the end, so that an interrupted export leaves no folder that looks like a checkpoint
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


# ------------------------------------------------------------------------------------------ by backend

Contents = tuple[dict[str, Any], dict[str, Tensor] | None]
"""An optimizer's state dict as one process has it, and the weights by the model's names; None where the checkpoint
already has files of whole weights, which are copied."""


def _read_whole(checkpoint: Path, scratch: Path) -> Contents:
    if not any(WHOLE_WEIGHTS.fullmatch(path.name) for path in checkpoint.iterdir()):
        raise FileNotFoundError(f"no {WEIGHTS}")
    return load_tensors(checkpoint / OPTIMIZER), None


def _read_fsdp(checkpoint: Path, scratch: Path) -> Contents:
    state = _read_full_or_sharded(checkpoint, "optimizer", scratch)
    weights = _read_full_or_sharded(checkpoint, "pytorch_model_fsdp", scratch)
    check_state(checkpoint, state)
    return whole_of_names(state), weights


def _read_full_or_sharded(checkpoint: Path, name: str, scratch: Path) -> Any:
    """A state dict of FSDP2: a full one is a file, a sharded one is a folder of ``torch.distributed.checkpoint``."""
    if (checkpoint / f"{name}.bin").is_file():
        return load_tensors(checkpoint / f"{name}.bin")
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(checkpoint / f"{name}_0", scratch / name)
    (state,) = load_tensors(scratch / name).values()  # accelerate saves it under one key
    return state


def _read_zero(checkpoint: Path, scratch: Path) -> Contents:
    folders = list(checkpoint.glob("global_step*"))
    latest = checkpoint / "latest"
    folder = checkpoint / latest.read_text().strip() if latest.is_file() else folders[0]
    if (folder / "zero").is_dir():
        raise OptionError(
            OPTION,
            str(checkpoint),
            "DeepSpeed's own checkpoint, of which export makes a whole one",
            "This is its universal format, which knows AdamW's moments alone and has lost the projection's.",
        )
    files = {m: path for path in folder.iterdir() if (m := RANK_FILE.fullmatch(path.name))}
    if not files or any(int(m[2]) for m in files):  # the second number is the rank in tensor parallelism
        raise OptionError(OPTION, str(checkpoint), "DeepSpeed ZeRO-1, 2 or 3 without tensor parallelism")
    by_rank = [files[m] for m in sorted(files, key=lambda m: int(m[1]))]
    with torch.serialization.safe_globals([pkgutil.resolve_name(name) for name in STORED_BY_DEEPSPEED]):
        wrapped = [load_tensors(path)["optimizer_state_dict"] for path in by_rank]
    # ZeRO-1 and 2 wrap our state dict and the flat weights under other keys than ZeRO-3
    states = [rank.get("base_optimizer_state") or rank["optimizer_state_dict"] for rank in wrapped]
    if any(not isinstance(state, dict) or SLICES not in state for state in states):
        raise OptionError(OPTION, str(checkpoint), OURS)
    flats = [rank.get("single_partition_of_fp32_groups") or rank["fp32_flat_groups"] for rank in wrapped]
    state, trained = whole_of_slices(states, flats)
    return state, _all_weights(folder, trained)


def _all_weights(folder: Path, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights and buffers of a model under its own names: trained ones, frozen ones; of tied weights one.

    Args:
        folder: ``global_stepN`` of DeepSpeed.
        trained: weights that the optimizer trains, whole, by logical name.
    """
    by_rank = sorted(
        folder.glob("*zero_pp_rank_*_model_states.pt"), key=lambda path: int(path.name.split("_rank_")[1].split("_")[0])
    )
    stage3 = bool(by_rank)  # ZeRO-1 and 2 write one file with whole weights
    files = by_rank or sorted(folder.glob("mp_rank_*_model_states.pt"))
    if not files:
        raise FileNotFoundError("no *_model_states.pt")
    ranks = [load_tensors(path) for path in files]
    weights = dict(ranks[0]["module"])
    if stage3:
        for name, shape in (ranks[0]["frozen_param_shapes"] or {}).items():
            fragments = torch.cat([rank["frozen_param_fragments"][name].view(-1) for rank in ranks])
            weights[name] = fragments[: shape.numel()].view(shape)  # the last fragment is padded
    for alias in ranks[0]["shared_params"]:
        weights.pop(alias, None)
    weights = {name: trained.get(logical_name(name), weight) for name, weight in weights.items()}
    # ZeRO-3 saves empty tensors in the places of partitioned weights: those not restored above are left out
    return {name: weight for name, weight in weights.items() if not (stage3 and weight.numel() == 0)}


def _write_random_state(folder: Path) -> None:
    """Write the random state of the first of several processes as that of one process."""
    from transformers.trainer_pt_utils import safe_globals

    first, alone = folder / "rng_state_0.pth", folder / "rng_state.pth"
    if not first.is_file() or alone.is_file():
        return
    with safe_globals():
        states = torch.load(first, weights_only=True)
    # with several processes each saves a list with the states of all devices
    devices = {kind: state[0] for kind, state in states.items() if isinstance(state, list) and state}
    torch.save({**states, **devices}, alone)
