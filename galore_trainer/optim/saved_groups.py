"""What a state dict says of parameter groups, and whether an optimizer's groups fit a saved one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from galore_trainer.config import AUTO, HEAD_ROLES, SPARSE_PERCENT, GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.layouts.find import Placement
from galore_trainer.layouts.shard import Shard
from galore_trainer.optim.param_groups import SLICES

logger = logging.getLogger(__name__)

WAY_OUT = (
    "Resume with the saved value, or start a new run from the checkpoint's weights "
    "(model_name_or_path: the checkpoint's folder, another output_dir, no resume)."
)
OTHER_LAYOUT = (
    "It was written under another launch. Make it whole: galore-ft state export CHECKPOINT NEW_OUTPUT_DIR; one process "
    "and DDP resume from that, FSDP2 and ZeRO after galore-ft state import."
)

SCALE_BEFORE_SAVED = 10.0
"""The scale of checkpoints that do not name it."""
DEFAULT_MODE = GaLoreConfig().residual_mode
OF_ROLES = " of "  # between a saved ``head_sharing`` and the roles that share


def check_same_method(saved: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> None:
    """Raise ``OptionError`` where saved groups belong to another method, other settings or other parameters."""
    if not all(isinstance(g, Mapping) and "projected" in g for g in saved):
        raise OptionError("optimizer", "a state saved by another optimizer", "one saved by GaLoreAdamW", WAY_OUT)
    check_same_settings([g for g in saved if g["projected"]], ours)
    names_before, names_now = ([n for g in groups for n in g.get("names", [])] for groups in (saved, ours))
    if names_before != names_now:
        changed = sorted(set(names_before) ^ set(names_now))[:5] or ["the same names in another order"]
        raise OptionError("parameters", changed, "the parameters of the checkpoint, in its order", WAY_OUT)
    if [(g["projected"], len(g["names"])) for g in saved] != [(g["projected"], len(g["names"])) for g in ours]:
        raise OptionError("parameters", "other groups", "the checkpoint's projected and plain groups", WAY_OUT)
    for before, now in zip(saved, ours, strict=True):
        _check_same_matrices(before, now)


def check_same_settings(saved: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]) -> None:
    """Raise ``OptionError`` where saved groups, projected ones alone, have other settings than those of ``ours``."""
    for before, now in zip(saved, [g for g in ours if g["projected"]], strict=False):
        then, here = _settings_in(before), now["galore"]
        differ = [key for key, value in here.items() if key != "scale" and then.get(key) != value]
        if differ:
            options = {key: "seed" if key == "seed" else f"galore.{key}" for key in differ}
            key, *more = differ
            others = "".join(f" Also {options[k]}: got {here[k]!r}, saved {then.get(k)!r}." for k in more)
            wanted = f"{then.get(key)!r} as in the checkpoint"
            way_out = WAY_OUT.replace("the saved value", f"{options[key]}={then.get(key)}")
            raise OptionError(options[key], here[key], wanted, way_out + others)


def saved_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a projected group as a state dict holds them.

    A reader such as ``torch.distributed.checkpoint`` wants the keys that it has saved, so that there are no new ones:
    residual, its mode and scale stand in ``residual_percent``, which is a number for a separate sparse residual (0 for
    none) at scale 10; ``head_sharing`` names the roles that share where not all of them do.
    """
    settings = dict(group["galore"])
    residual, own_scale, percent = settings.pop("residual"), settings.pop("scale"), settings["residual_percent"]
    mode, roles = settings.pop("residual_mode"), settings.pop("share_heads_of")
    scale = group.get("scale", own_scale)
    if residual not in ("sparse", "none") or mode != DEFAULT_MODE or scale != SCALE_BEFORE_SAVED:
        of_mode = "" if mode == DEFAULT_MODE else f" {mode}"
        settings["residual_percent"] = f"{residual} {percent!r}{of_mode}, scale {scale}"
    if len(roles) < len(HEAD_ROLES):
        settings["head_sharing"] += f"{OF_ROLES}{', '.join(roles)}"
    return settings


def _settings_in(group: Mapping[str, Any]) -> dict[str, Any]:
    """Undo ``saved_settings``; what is younger than the checkpoint has the value of its time."""
    saved: dict[str, Any] = {
        **GaLoreConfig().trajectory(),
        "residual_percent": SPARSE_PERCENT,
        **group.get("galore", {}),
    }
    sharing, _, roles = str(saved["head_sharing"]).partition(OF_ROLES)
    if roles:
        saved |= {"head_sharing": sharing, "share_heads_of": roles.split(", ")}
    text = saved["residual_percent"]
    try:
        if not isinstance(text, str):
            return {**saved, "residual": "sparse" if text > 0.0 else "none", "scale": SCALE_BEFORE_SAVED}
        of_residual, scale = text.split(", scale ")
        residual, percent, mode = (*of_residual.split(), DEFAULT_MODE)[:3]
        numbers = {"residual_percent": float(percent), "scale": scale if scale == AUTO else float(scale)}
        return {**saved, "residual": residual, "residual_mode": mode, **numbers}
    except (TypeError, ValueError):
        wanted = "a number, or a residual with its percent and scale"
        raise OptionError("checkpoint", f"residual_percent {text!r}", wanted, WAY_OUT) from None


def scale_after_load(group: Mapping[str, Any], before: Mapping[str, Any]) -> float | str:
    """The scale of a group that takes over the state of a saved one, whose scale ``auto`` takes over, too.

    A number that was asked for stays. A difference is logged.
    """
    ours = group.get("scale", group["galore"]["scale"])
    saved = before.get("scale", _settings_in(before)["scale"])
    kept: float | str = saved if ours == AUTO else ours
    if ours != saved:
        logger.warning(
            "galore.scale: %s is asked for, the checkpoint was trained with %s; %s is used", ours, saved, kept
        )
    return kept


def _check_same_matrices(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ``OptionError`` where a weight's logical matrices differ: its shape, or how its heads are read."""
    for name, described, now in zip(ours["names"], saved.get("matrices", ()), ours.get("matrices", ()), strict=False):
        if [dict(fields) for fields in described] == [dataclasses.asdict(matrix) for matrix in now]:
            continue
        got, wanted = (
            " + ".join(_in_words(m) for m in matrices) for matrices in (map(dataclasses.asdict, now), described)
        )
        raise OptionError(f"heads of {name}", got, f"{wanted}, as in the checkpoint", WAY_OUT)


def _in_words(fields: Mapping[str, Any]) -> str:
    """A logical matrix, from its described form."""
    rows, head_dim = fields["outer"] * fields["length"], fields["head_dim"]
    heads = f"{rows // head_dim} heads of {head_dim} rows" if head_dim else "no heads"
    bases = f"{fields['blocks']} bases of rank {fields['rank']} on the {fields['side']}"
    return f"{fields['label']} {rows} x {fields['columns']}, {heads}, {bases}".strip()


def check_same_layout(saved: Mapping[str, Any], ours: Sequence[dict[str, Any]], flat: bool) -> None:
    """Raise ``OptionError`` where a state was saved under another layout.

    Args:
        saved: what ``GaLoreAdamW.state_dict`` gave.
        ours: this optimizer's groups.
        flat: whether DeepSpeed has put flat tensors in their parameters' place.
    """
    counts = ([len(g["params"]) for g in groups] for groups in (saved["param_groups"], ours))
    if (SLICES in saved) != flat or len({*map(tuple, counts)}) > 1:
        kinds = {True: "slices of DeepSpeed ZeRO", False: "whole weights or rows"}
        got = kinds[SLICES in saved]
        raise OptionError("checkpoint", got, f"a state of {kinds[flat]}, cut as here", OTHER_LAYOUT)


def checked_shard(placement: Placement, p: Tensor, name: str) -> Shard:
    """The rows of a DTensor that this process holds; ``OptionError`` where it is not cut between its rows, once."""
    try:
        return placement.shard(p, name)
    except ValueError as error:
        raise OptionError("fsdp", str(error), "FSDP2, whole or hybrid", "See What works where in the README.") from None
