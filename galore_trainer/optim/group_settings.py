"""What a parameter group may say beside its parameters, and the settings that follow from it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.targets.matrices import project_whole
from galore_trainer.targets.names import logical_name

OVERRIDES = ("rank", "update_proj_gap", "scale", "proj_type")
"""Settings of ``GaLoreConfig`` that a group can set for itself, as groups for galore-torch do."""
OPTIONS = ("lr", "betas", "eps", "weight_decay", *OVERRIDES)
OURS = ("params", "names", "param_names", "projected", "matrices", "galore")
TRAINED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FROM_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "base_lr", "max_momentum", "base_momentum", "swa_lr")
ROUNDING = 1e-12  # below zero, for what a schedule computes as 0
OF_TORCH = ("amsgrad", "maximize", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")


def prepare_group(group: dict[str, Any]) -> None:
    """Check what a new group says, and fill in ``projected``: a group with any of ``OVERRIDES`` is projected.

    Args:
        group: as the user gave it, in place.

    Raises:
        OptionError: a key that means nothing here, overrides in a group that is not projected, or beside ``matrices``.
    """
    for key in group:
        if key in OF_TORCH:
            way_out = "Leave it out: GaLoreAdamW chooses its own implementation, and its update has no such variant."
            raise OptionError(f"param_groups: {key}", group[key], "no such key in a group", way_out)
        if key not in (*OPTIONS, *OURS, *FROM_SCHEDULERS):
            nearest = difflib.get_close_matches(str(key), (*OPTIONS, *OURS), 1)
            way_out = f"Did you mean {nearest[0]}?" if nearest else "Settings of all groups belong to GaLoreConfig."
            raise OptionError(f"param_groups: {key}", group[key], f"one of {', '.join(OPTIONS)}", way_out)
    own = [key for key in OVERRIDES if key in group]
    group.setdefault("projected", bool(own))
    if own and not group["projected"]:
        raise OptionError("param_groups: projected", False, f"True beside {own[0]}", "Leave one of them out.")
    if own and own != ["scale"] and "matrices" in group:
        way_out = "Set it in GaLoreConfig (rank_pattern gives single modules a rank)."
        raise OptionError(f"param_groups: {own[0]}", group[own[0]], "none beside matrices", way_out)


def check_optimizer_options(group: Mapping[str, Any]) -> None:
    """Raise ``OptionError`` for a learning rate, eps, decay or betas that are impossible."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise OptionError("lr", tuple(lr.tolist()), "a number, or a tensor that holds one")
    for option in ("lr", "eps", "weight_decay"):
        value = group[option]
        # reading a number on an accelerator would wait for it
        if not _is_number(value) or (not _is_far(value) and not -ROUNDING <= value < math.inf):
            raise OptionError(option, value, "a finite number of at least 0")
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise OptionError("betas", betas, "two numbers in [0, 1)")
    for i, beta in enumerate(betas):
        if not (_is_number(beta) and 0.0 <= beta < 1.0):
            raise OptionError(f"betas[{i}]", beta, "a number in [0, 1)")


def check_unchanged(group: Mapping[str, Any]) -> None:
    """Raise ``OptionError`` where a group was given settings that it cannot follow any more, or never could.

    To be called in every step: schedulers and users write into groups.
    """
    check_optimizer_options(group)
    for key in OF_TORCH:
        if group.get(key):
            raise OptionError(f"param_groups: {key}", group[key], "no such key in a group", "Take it out.")
    settings, scale = group.get("galore", {}), group.get("scale", 1.0)
    if not (_is_number(scale) and 0.0 <= scale < math.inf):
        raise OptionError("galore.scale", scale, "a finite number of at least 0")
    for key in OVERRIDES:
        if key in group and key in settings and group[key] != settings[key]:
            wanted = f"{settings[key]!r}, with which the group was added"
            raise OptionError(f"param_groups: {key}", group[key], wanted, "Build a new optimizer for another value.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _is_far(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def complete_group(
    group: dict[str, Any], others: Sequence[Mapping[str, Any]], config: GaLoreConfig, seed: int
) -> None:  # fmt: skip
    """Check a new group, and fill in names, logical matrices and the settings that a resume must find again.

    Args:
        group: with torch's defaults filled in.
        others: the groups before it.
        config, seed: of the optimizer.

    Raises:
        OptionError: an option, a name or a parameter that cannot be honoured.
    """
    check_optimizer_options(group)
    params, names = group["params"], [logical_name(name) for name in group.get("param_names", ())]
    group.setdefault("names", names or [f"{len(others)}.{i}" for i in range(len(params))])
    check_names(group["names"], len(params), [name for other in others for name in other["names"]])
    for p, name in zip(params, group["names"], strict=True):
        check_parameter(p, name)
    if group["projected"]:
        config = config_of(group, config)
        if "matrices" in group:
            _check_made_for(group.get("galore", {}), config)
        else:
            shapes = [getattr(p, "ds_shape", p.shape) for p in params]  # of the whole weight under ZeRO-3
            pairs = zip(shapes, group["names"], strict=True)
            group["matrices"] = [[project_whole(shape, name, config)] for shape, name in pairs]
        fields = config.to_dict()
        group["galore"] = {key: fields[key] for key in GaLoreConfig.trajectory_fields()} | {"seed": seed}


def _check_made_for(settings: Mapping[str, Any], config: GaLoreConfig) -> None:
    """Raise ``OptionError`` where logical matrices were made under other settings than the optimizer's."""
    own = config.to_dict()
    for key, value in settings.items():
        if key in own and own[key] != value:
            way_out = "Give GaLoreAdamW the config that the groups were made with, or make groups anew."
            raise OptionError(f"galore.{key}", own[key], f"{value!r}, as in the parameter groups", way_out)


def check_names(names: Sequence[str], count: int, taken: Sequence[str]) -> None:
    """Raise ``OptionError`` unless a group has a name of its own for each parameter.

    Args:
        names: of the group's parameters.
        count: how many parameters it has.
        taken: names in other groups.
    """
    if len(names) != count:
        raise OptionError("param_groups: names", f"{len(names)} names", f"{count}, one for each parameter")
    seen = set(taken)
    for name in names:
        if name in seen:
            way_out = "Names seed random streams and tell states apart: give each parameter its own."
            raise OptionError("param_groups: names", name, "a name that no other parameter has", way_out)
        seen.add(name)


def check_parameter(p: Tensor, name: str) -> None:
    """Raise ``OptionError`` for a parameter that this optimizer would not train as its user expects."""
    if torch.nn.parameter.is_lazy(p):
        raise OptionError("parameters", f"{name}, which has no shape yet", "a weight", "Run the model once before.")
    if p.is_complex():
        way_out = "Train torch.view_as_real of it, or give it to torch.optim.AdamW."
        raise OptionError("parameters", f"{name} in {p.dtype}", "a real weight", way_out)
    if p.is_floating_point() and p.dtype not in TRAINED:
        got = f"{name} in {p.dtype}"
        raise OptionError("parameters", got, "float32, bfloat16, float16 or float64", "Train a copy in one of these.")
    if type(p).__name__ == "FlatParameter" or getattr(p, "_fsdp_flattened", False):
        way_out = "Use FSDP2 (fsdp_version 2, fully_shard): it keeps weights as matrices."
        raise OptionError("fsdp", f"{name}, a flat parameter of FSDP1", "FSDP2", way_out)
    strides = p.stride() if p.layout == torch.strided else ()
    if any(size > 1 and stride == 0 for size, stride in zip(p.shape, strides, strict=False)):
        got = f"{name}, an expanded tensor: several of its entries are one number in memory"
        raise OptionError("parameters", got, "a weight with memory of its own", "Use .clone() before nn.Parameter.")


def warn_if_plain(groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn where no group is projected."""
    if not any(group["projected"] for group in groups):
        warnings.warn(
            "This GaLoreAdamW projects nothing: it is AdamW. Take its groups from build_optimizer or galore_plugin, or "
            "give one of them projected=True or a rank.",
            stacklevel=3,
        )


def given_config(config: Any) -> GaLoreConfig:
    """The optimizer's settings; ``OptionError`` for something else in their place, such as a learning rate."""
    if not isinstance(config, GaLoreConfig | None):
        raise OptionError("config", config, "a GaLoreConfig", "Give lr by its name: lr=1e-4.")
    return config or GaLoreConfig()


def config_of(group: Mapping[str, Any], config: GaLoreConfig) -> GaLoreConfig:
    """The settings of one group.

    Args:
        group: its overrides win.
        config: of the optimizer.

    Raises:
        OptionError: an impossible override.
    """
    return dataclasses.replace(config, **{key: group[key] for key in OVERRIDES if key in group})


def settings_of(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What groups say that a loaded state may overrule; ``initial_lr`` is the learning rate before any schedule."""
    keys = ("initial_lr", "weight_decay", "betas", "eps")
    return [{key: group[key] for key in keys if key in group} for group in groups]


def scale_of(group: Mapping[str, Any], config: GaLoreConfig) -> float:
    """The factor on the lifted update of a projected group."""
    scale: float = group.get("scale", config.scale)
    return scale


def gap_of(group: Mapping[str, Any]) -> int:
    """Steps between two refreshes of a projected group."""
    gap: int = group["galore"]["update_proj_gap"]
    return gap
