"""What ``TrainingArguments`` say about the optimizer: what it takes from them, and what it would ignore."""

from __future__ import annotations

import math
from typing import Any

from galore_trainer.errors import OptionError
from galore_trainer.optim.galore_adamw import GaLoreAdamW

FIELDS = {
    "lr": ("learning_rate",),
    "weight_decay": ("weight_decay",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    "seed": ("seed",),
}
"""The optimizer's arguments, and the fields that each is taken from."""
ADAMW = ("adamw_torch", "adamw_torch_fused")  # the default of ``optim``, by version of torch


def optimizer_settings(args: Any) -> dict[str, Any]:
    """The optimizer's arguments as ``TrainingArguments`` say them now."""
    values = {name: tuple(getattr(args, field) for field in fields) for name, fields in FIELDS.items()}
    return {name: value if len(value) > 1 else value[0] for name, value in values.items()}


def check_ignored(args: Any) -> None:
    """Raise ``OptionError`` for a field that asks the Trainer for another optimizer."""
    replacements = {"optim_args": "the fields of GaLoreConfig", "optim_target_modules": "target_modules"}
    for name, replacement in replacements.items():
        value = getattr(args, name, None)
        if value:
            raise OptionError(name, value, "nothing, beside this plugin", f"Use {replacement} instead.")
    optim = getattr(args, "optim", None)
    optim = getattr(optim, "value", optim)
    if optim is not None and optim not in ADAMW:
        way_out = "The plugin brings the optimizer: leave optim out. For a smaller state see state_bits."
        raise OptionError("optim", optim, "its default, beside this plugin", way_out)


def check_kept(optimizer: GaLoreAdamW, args: Any) -> None:
    """Raise ``OptionError`` for a field that changed after the optimizer took it, which the Trainer keeps."""
    took = {**optimizer.defaults, "seed": optimizer.seed}
    for name, now in optimizer_settings(args).items():
        if now == took[name]:
            continue
        wanted = f"{took[name]!r}, which the optimizer was made with"
        way_out = "A Trainer keeps its optimizer between calls of train(): make a new Trainer."
        raise OptionError(" and ".join(FIELDS[name]), now, wanted, way_out)


def overruled(optimizer: GaLoreAdamW) -> str:
    """Settings of a loaded state that differ from what the optimizer was made with, both values of each; else empty.

    The learning rate is compared where a schedule keeps it as ``initial_lr``: ``reduce_lr_on_plateau`` does not.
    """
    groups = optimizer.param_groups
    pairs = list(zip(groups, optimizer.asked, strict=False))
    first = next((pair for pair in pairs if pair[0]["projected"]), None)
    found: dict[str, None] = {}
    for group, asked in pairs:
        # a cyclic schedule moves beta1 and says so in the group
        cycled = "max_momentum" in group or "base_momentum" in group
        values = {
            "learning_rate": tuple(each.get("initial_lr") for each in (group, asked)),
            "weight_decay": (group["weight_decay"], asked["weight_decay"]),
            "adam_beta1": (None, None) if cycled else (group["betas"][0], asked["betas"][0]),
            "adam_beta2": (group["betas"][1], asked["betas"][1]),
            "adam_epsilon": (group["eps"], asked["eps"]),
        }
        if first is not None and not group["projected"]:  # its learning rate follows from that of the projected ones
            rates = zip(values.pop("learning_rate"), (each.get("initial_lr") for each in first), strict=True)
            values["galore.plain_lr_ratio"] = tuple(
                rate / lead if rate is not None and lead else None for rate, lead in rates
            )
        for name, (saved, now) in values.items():
            if saved is not None and now is not None and not math.isclose(saved, now):
                found[f"{name} {float(saved):.6g} (now asked for: {float(now):.6g})"] = None
    return ", ".join(found)
