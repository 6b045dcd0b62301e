"""What a parameter group may say beside its parameters, and whether it was changed by hand."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import AUTO, GaLoreConfig
from galore_trainer.core.galore import compute_dtype
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.errors import OptionError
from galore_trainer.layouts.find import Noted, Placement, address_of
from galore_trainer.targets.matrices import project_whole
from galore_trainer.targets.names import logical_name

SLICES = "slices"  # in a state dict: of each flat tensor, by its number, name, shape, start, stop and offset of weights
CHANGED = "Change a model before its optimizer is built, or build a new one."

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
    overrides = [key for key in OVERRIDES if key in group]
    group.setdefault("projected", bool(overrides))
    if overrides and not group["projected"]:
        raise OptionError("param_groups: projected", False, f"True beside {overrides[0]}", "Leave one of them out.")
    if overrides and overrides != ["scale"] and "matrices" in group:
        way_out = "Set it in GaLoreConfig (rank_pattern gives single modules a rank)."
        raise OptionError(f"param_groups: {overrides[0]}", group[overrides[0]], "none beside matrices", way_out)


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
    if scale != AUTO and not (_is_number(scale) and 0.0 <= scale < math.inf):
        raise OptionError("galore.scale", scale, f"a finite number of at least 0, or {AUTO}")
    for key in OVERRIDES:
        if key in group and key in settings and group[key] != settings[key] and key != "scale":
            wanted = f"{settings[key]!r}, with which the group was added"
            raise OptionError(f"param_groups: {key}", group[key], wanted, "Build a new optimizer for another value.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _is_far(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def complete_group(group: dict[str, Any], others: Sequence[Mapping[str, Any]], config: GaLoreConfig, seed: int) -> None:
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
            _check_made_for({k: v for k, v in group.get("galore", {}).items() if k not in group}, config)
        else:
            shapes = [getattr(p, "ds_shape", p.shape) for p in params]  # of the whole weight under ZeRO-3
            pairs = zip(shapes, group["names"], strict=True)
            group["matrices"] = [[project_whole(shape, name, config)] for shape, name in pairs]
        group["galore"] = config.trajectory() | {"scale": config.scale, "seed": seed}


def _check_made_for(settings: Mapping[str, Any], config: GaLoreConfig) -> None:
    """Raise ``OptionError`` where logical matrices were made under other settings than the optimizer's."""
    ours = config.trajectory()
    for key, value in settings.items():
        if key in ours and ours[key] != value:
            way_out = "Give GaLoreAdamW the config that the groups were made with, or make groups anew."
            raise OptionError(f"galore.{key}", ours[key], f"{value!r}, as in the parameter groups", way_out)


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


def given_config(config: Any, max_grad_norm: float | None = None) -> GaLoreConfig:
    """The optimizer's settings, with the one that is an argument of its own, too.

    Raises:
        OptionError: something else in the place of a configuration, such as a learning rate; another limit than its.
    """
    if not isinstance(config, GaLoreConfig | None):
        raise OptionError("config", config, "a GaLoreConfig", "Give lr by its name: lr=1e-4.")
    config = config or GaLoreConfig()
    if max_grad_norm is None:
        return config
    if config.max_grad_norm not in (None, max_grad_norm):
        raise OptionError("max_grad_norm", max_grad_norm, f"the config's {config.max_grad_norm}", "Give one of them.")
    return dataclasses.replace(config, max_grad_norm=max_grad_norm)


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


def scale_of(group: Mapping[str, Any], config: GaLoreConfig, matrix: LogicalMatrix) -> float:
    """The factor on the lifted update of a projected weight."""
    scale: float | str = group.get("scale", group.get("galore", {}).get("scale", config.scale))
    return matrix.auto_scale if isinstance(scale, str) else scale


def gap_of(group: Mapping[str, Any]) -> int:
    """Steps between two refreshes of a projected group."""
    gap: int = group["galore"]["update_proj_gap"]
    return gap


def phases(groups: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Where in its gap the refreshes of each weight lie, by name: spread evenly over all projected weights.

    Equal weights follow one another, since bases of equal matrices are found together in hardly more time than one.
    """
    alike: dict[tuple[Any, ...], list[tuple[str, int]]] = {}
    for group in groups:
        if group["projected"]:
            for name, matrices in zip(group["names"], group["matrices"], strict=True):
                key = (id(group), *(matrix.form for matrix in matrices))
                alike.setdefault(key, []).append((name, gap_of(group)))
    ordered = list(itertools.chain.from_iterable(alike.values()))
    return {name: i * gap // len(ordered) for i, (name, gap) in enumerate(ordered)}


def next_due(calls: int, gap: int, phase: int) -> int:
    """The first step after ``calls`` on the grid phase, phase + gap, ...; one that had to wait does not shift it."""
    return calls + gap - (calls - phase) % gap


# ---------------------------------------------------------------------- changed by hand


def noted_of(placement: Placement, group: Mapping[str, Any]) -> Noted:
    """What was noted of a group; raises ``OptionError`` for a group that was put into ``param_groups`` by hand."""
    noted = placement.noted(group)
    if noted is None:
        raise _by_hand("a group put in by hand")
    return noted


def check_groups(placement: Placement, groups: Sequence[dict[str, Any]]) -> None:
    """Raise ``OptionError`` where groups, their parameters or settings were changed so that they cannot be followed."""
    for group in groups:
        check_unchanged(group)
        noted, count = noted_of(placement, group), len(group["params"])
        if len(noted.shapes) != count and not placement.is_flat(group):
            raise _by_hand(f"{count} parameters in a group of {len(noted.shapes)}")
        if noted.projected != group["projected"]:
            raise _by_hand(f"projected {group['projected']} in a group that was added with {noted.projected}")
    names = [group["names"][0] for group in groups if group["names"]]
    if len(set(names)) < len(names):
        raise _by_hand("two groups of the same names")


def check_if_changed(noted: Noted, group: Mapping[str, Any], i: int, state: Mapping[str, Any] | None) -> None:
    """Call ``check_noted`` where the shape of a parameter, or its place in memory, is no longer what was noted."""
    p = group["params"][i]
    if p.shape != noted.shapes[i] or address_of(p) != noted.addresses[i]:
        check_noted(noted, group, i, state)


def check_noted(noted: Noted, group: Mapping[str, Any], i: int, state: Mapping[str, Any] | None) -> None:
    """Compare a parameter with what was noted of it, and note it anew where it still fits.

    Args:
        noted: of the group, from ``Placement``.
        group: one of ``param_groups``.
        i: position of the parameter in its group.
        state: of the parameter, empty or None before its first step.

    Raises:
        OptionError: it does not fit its state, its logical matrices or its gradient any more.
    """
    p, name = group["params"][i], group["names"][i]
    if p.shape != noted.shapes[i] and (state or group["projected"]):
        now, before = list(p.shape), list(noted.shapes[i])
        raise OptionError("parameters", f"{name} of shape {now}", f"shape {before}, as when it was added", CHANGED)
    if p.grad is not None and p.grad.shape != p.shape:
        got = f"{name} of shape {list(p.shape)} with a gradient of shape {list(p.grad.shape)}"
        raise OptionError("parameters", got, "a gradient of its own shape", "Call zero_grad and backward again.")
    if state:
        device = state["skipped"].device
        if device != p.device:
            wanted = f"{device}, where its state lies"
            raise OptionError("parameters", f"{name} on {p.device}", wanted, CHANGED)
        if compute_dtype(p.dtype) != compute_dtype(noted.dtypes[i]):
            wanted = f"{noted.dtypes[i]}, which its state was made for"
            raise OptionError("parameters", f"{name} in {p.dtype}", wanted, CHANGED)
    noted.note(i, p)


def _by_hand(got: str) -> OptionError:
    return OptionError("param_groups", got, "groups as they were added", "Use add_param_group.")
