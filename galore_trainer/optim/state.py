"""What a parameter's state holds, and which saved states fit an optimizer.

Inside the optimizer, counters (``calls``, ``refreshes``, ``due``, ``born``, ``phase``) are integers. A state dict holds
them as tensors without dimensions, on the CPU, since ``torch.distributed.checkpoint`` loads nothing else in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.optim.locate import BAR
from galore_trainer.optim.pieces import AGE_KEYS

WAY_OUT = (
    "Resume with the saved value, or start a new run from the checkpoint's weights "
    "(model_name_or_path: the checkpoint's folder, another output_dir, no resume)."
)
OTHER_LAYOUT = (
    "It was written under another launch. Make it whole: galore-ft state export CHECKPOINT NEW_OUTPUT_DIR; one process "
    "and DDP resume from that, FSDP2 and ZeRO after galore-ft state import."
)
SLICES = "slices"  # in a state dict: of each flat tensor, by its number, name, shape, start, stop and offset of weights


COUNTERS = ("calls", "refreshes", "due", "born", "phase")


def bare(key: str) -> str:
    """A key of a state without the names of a flat tensor's weight and of a matrix."""
    return key.rsplit(BAR, 1)[-1].rsplit(".", 1)[-1]


def packed_counters(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state with its counters as tensors."""
    return {
        key: torch.tensor(value, dtype=torch.int64, device="cpu") if bare(key) in COUNTERS else value
        for key, value in state.items()
    }


def restored(state: Mapping[str, Any], p: Tensor) -> dict[str, Any]:
    """A saved state of a parameter as the optimizer keeps it.

    Counters become integers, ages tensors; every tensor is a contiguous copy on the parameter's device.
    """
    found: dict[str, Any] = {}
    for key, value in state.items():
        if bare(key) in COUNTERS:
            if not 0 <= value == int(value):
                raise OptionError("checkpoint", f"{key} {value}", "a count", WAY_OUT)
            found[key] = int(value)
        elif isinstance(value, Tensor) or bare(key) in AGE_KEYS:
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32, device="cpu")
            found[key] = tensor.detach().to(p.device, copy=True).contiguous()
        else:
            found[key] = value
    return found


def check_same_method(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """Raise ``OptionError`` where saved groups belong to another method, other settings or other parameters."""
    if not any(isinstance(g, Mapping) and "projected" in g for g in saved):
        raise OptionError("optimizer", "a state saved by another optimizer", "one saved by GaLoreAdamW", WAY_OUT)
    for before, now in zip([g for g in saved if g["projected"]], [g for g in own if g["projected"]], strict=False):
        saved_settings = {**GaLoreConfig().to_dict(), **before.get("galore", {})}  # fields younger than the checkpoint
        for key, value in now["galore"].items():
            if saved_settings.get(key) != value:
                option = "seed" if key == "seed" else f"galore.{key}"
                raise OptionError(option, value, f"{saved_settings.get(key)!r} as in the checkpoint", WAY_OUT)
    names_before, names_now = ([n for g in groups for n in g.get("names", [])] for groups in (saved, own))
    if names_before != names_now:
        changed = sorted(set(names_before) ^ set(names_now))[:5] or ["the same names in another order"]
        raise OptionError("parameters", changed, "the parameters of the checkpoint, in its order", WAY_OUT)
    if [(g["projected"], len(g["names"])) for g in saved] != [(g["projected"], len(g["names"])) for g in own]:
        raise OptionError("parameters", "other groups", "the checkpoint's projected and plain groups", WAY_OUT)
    for before, now in zip(saved, own, strict=True):
        _check_same_matrices(before, now)


def _check_same_matrices(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ``OptionError`` where a weight's logical matrices differ: its shape, or how its heads are read."""
    for name, described, now in zip(own["names"], saved.get("matrices", ()), own.get("matrices", ()), strict=False):
        if [dict(fields) for fields in described] == [dataclasses.asdict(matrix) for matrix in now]:
            continue
        got, wanted = (" + ".join(_in_words(m) for m in each) for each in (map(dataclasses.asdict, now), described))
        raise OptionError(f"heads of {name}", got, f"{wanted}, as in the checkpoint", WAY_OUT)


def _in_words(fields: Mapping[str, Any]) -> str:
    """A logical matrix, from its described form."""
    rows, head_dim = fields["outer"] * fields["length"], fields["head_dim"]
    heads = f"{rows // head_dim} heads of {head_dim} rows" if head_dim else "no heads"
    bases = f"{fields['blocks']} bases of rank {fields['rank']} on the {fields['side']}"
    return f"{fields['label']} {rows} x {fields['columns']}, {heads}, {bases}".strip()


def check_same_layout(saved: Mapping[str, Any], own: list[dict[str, Any]], flat: bool) -> None:
    """Raise ``OptionError`` where a state was saved under another layout.

    Args:
        saved: what ``GaLoreAdamW.state_dict`` gave.
        own: this optimizer's groups.
        flat: whether DeepSpeed has put flat tensors in their parameters' place.
    """
    counts = ([len(g["params"]) for g in groups] for groups in (saved["param_groups"], own))
    if (SLICES in saved) != flat or len({*map(tuple, counts)}) > 1:
        kinds = {True: "slices of DeepSpeed ZeRO", False: "whole weights or rows"}
        got = kinds[SLICES in saved]
        raise OptionError("checkpoint", got, f"a state of {kinds[flat]}, cut as here", OTHER_LAYOUT)


def bytes_by_kind(states: Iterable[tuple[bool, Mapping[str, Any]]]) -> dict[str, int]:
    """Bytes of the tensors in states: basis, moments, residual, plain (AdamW of what is not projected).

    Args:
        states: for each parameter, whether it is projected, and its state.
    """
    kinds = {"basis": 0, "moments": 0, "residual": 0, "plain": 0}
    for projected, state in states:
        for key, value in state.items():
            if isinstance(value, Tensor):
                kinds[_kind(key, projected)] += value.numel() * value.element_size()
    return kinds


def _kind(key: str, projected: bool) -> str:
    name = bare(key)
    if not projected:
        return "plain"
    if name.startswith(("residual", "candidate")):
        return "residual"
    return "basis" if name.startswith("basis") else "moments"
