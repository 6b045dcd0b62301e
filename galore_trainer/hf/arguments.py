"""What ``TrainingArguments`` say about the optimizer: what it takes from them, and what it would ignore."""

from __future__ import annotations

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
