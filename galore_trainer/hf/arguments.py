"""``TrainingArguments`` and the optimizer: the fields that it uses, and those that would be ignored."""

from __future__ import annotations

import math
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from galore_trainer.errors import OptionError
from galore_trainer.optim.galore_adamw import GaLoreAdamW

FIELDS = {
    "lr": ("learning_rate",),
    "weight_decay": ("weight_decay",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    "seed": ("seed",),
}
"""The fields of ``TrainingArguments`` that give each argument of the optimizer."""
ADAMW = ("adamw_torch", "adamw_torch_fused")
"""Defaults of ``optim``, which depend on the version of torch."""
ONE_RATIO = "Use plain_lr_ratio, which is for every weight that is not projected."
UNUSED = {
    "optim_args": "Use the fields of GaLoreConfig instead.",
    "optim_target_modules": "Use target_modules instead.",
    # fields that axolotl, unsloth and ms-swift add
    "embedding_lr": ONE_RATIO,
    "embedding_lr_scale": ONE_RATIO,
    "embedding_learning_rate": ONE_RATIO,
    "lr_groups": "Use scale and plain_lr_ratio, which are for all projected and for all other weights.",
    "vit_lr": ONE_RATIO,
    "aligner_lr": ONE_RATIO,
    "loraplus_lr_ratio": "It is for adapters, which are not trained here.",
    "lorap_lr_ratio": "It is for adapters, which are not trained here.",
    "q_galore_config": "Use the fields of GaLoreConfig instead.",
    "use_galore": "Use the fields of GaLoreConfig instead.",
}
"""Fields that would change the optimizer and would be ignored, with the way out."""


def optimizer_settings(args: Any) -> dict[str, Any]:
    """The optimizer's arguments by the present values of ``TrainingArguments``."""
    values = {name: tuple(getattr(args, field) for field in fields) for name, fields in FIELDS.items()}
    return {name: value if len(value) > 1 else value[0] for name, value in values.items()}


def check_ignored(args: Any) -> None:
    """Raise ``OptionError`` for a field that asks the Trainer for another optimizer, which the plugin would replace."""
    for name, way_out in UNUSED.items():
        if value := getattr(args, name, None):
            raise OptionError(name, value, "nothing, beside this plugin", way_out)
    optim = getattr(args, "optim", None)
    optim = getattr(optim, "value", optim)
    if optim is not None and optim not in ADAMW:
        way_out = "The plugin brings the optimizer: leave optim out. For a smaller state see state_bits."
        raise OptionError("optim", optim, "its default, beside this plugin", way_out)


def check_kept(optimizer: GaLoreAdamW, args: Any) -> None:
    """Raise ``OptionError`` for a field that changed after the optimizer was made.

    A Trainer keeps its optimizer between calls of ``train()``, so the new value would have no effect.
    """
    used = {**optimizer.defaults, "seed": optimizer.seed}
    for name, now in optimizer_settings(args).items():
        if now != used[name]:
            wanted = f"{used[name]!r}, which the optimizer was made with"
            way_out = "A Trainer keeps its optimizer between calls of train(): make a new Trainer."
            raise OptionError(" and ".join(FIELDS[name]), now, wanted, way_out)


def rebuilt_schedule(state: Any, optimizer: Any, scheduler: Any, saved_steps: int | None = None) -> str:
    """What a resumed run's learning rate jumps to, in one line; empty where it goes on as it was.

    The Trainer lays a schedule over the steps of the new run, and takes the learning rate of the checkpoint for the
    first step: with another ``max_steps``, warm-up or kind of schedule the second step has a rate of its own.

    Args:
        state: of the Trainer.
        optimizer, scheduler: of the Trainer, with the checkpoint loaded.
        saved_steps: ``max_steps`` of the checkpoint's run, where it is known.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    # other schedulers, such as reduce_lr_on_plateau, go on from the rate that they find
    if not state.global_step or not isinstance(scheduler, LambdaLR):
        return ""
    rates = [
        (float(group["lr"]), float(base) * factor(scheduler.last_epoch))
        for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=False)
    ]
    saved, now = next((pair for pair in rates if not math.isclose(*pair, rel_tol=1e-6)), (0.0, 0.0))
    if saved == now:
        return ""
    before = "" if saved_steps is None or saved_steps == state.max_steps else f" (the checkpoint's run: {saved_steps})"
    return (
        f"the schedule of the learning rate is rebuilt for max_steps {state.max_steps}{before}: after step "
        f"{state.global_step} it gives {now:.6g} where the checkpoint has {saved:.6g}; the first step takes the latter"
    )


def overruled(optimizer: GaLoreAdamW) -> str:
    """Settings of a loaded state that differ from those that the optimizer was made with; empty where none differ.

    The learning rate is compared where a schedule keeps it as ``initial_lr``; ``reduce_lr_on_plateau`` does not.

    Returns:
        Names with both values, for example ``weight_decay 0.1 (now asked for: 0)``.
    """
    # ``asked`` is empty where no state was loaded
    pairs = list(zip(optimizer.param_groups, optimizer.settings_before_load, strict=False))
    projected = next((pair for pair in pairs if pair[0]["projected"]), None)
    differences: dict[str, None] = {}  # in order, each once
    for loaded, asked in pairs:
        # a cyclic schedule moves beta1; its groups have one of these keys
        cyclic = "max_momentum" in loaded or "base_momentum" in loaded
        values: dict[str, tuple[Any, ...]] = {
            "learning_rate": (loaded.get("initial_lr"), asked.get("initial_lr")),
            "weight_decay": (loaded["weight_decay"], asked["weight_decay"]),
            "adam_beta1": (None, None) if cyclic else (loaded["betas"][0], asked["betas"][0]),
            "adam_beta2": (loaded["betas"][1], asked["betas"][1]),
            "adam_epsilon": (loaded["eps"], asked["eps"]),
        }
        if projected is not None and not loaded["projected"]:
            # the learning rate of plain weights is plain_lr_ratio x that of projected ones: only the ratio is theirs
            plain_lr = values.pop("learning_rate")
            projected_lr = [group.get("initial_lr") for group in projected]
            values["galore.plain_lr_ratio"] = tuple(
                lr / base if lr is not None and base else None for lr, base in zip(plain_lr, projected_lr, strict=True)
            )
        for name, (saved, now) in values.items():
            if saved is not None and now is not None and not math.isclose(saved, now):
                differences[f"{name} {float(saved):.6g} (now asked for: {float(now):.6g})"] = None
    return ", ".join(differences)
