"""Which distributed backend the Trainer of this process will use."""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

from galore_trainer.errors import OptionError

Backend = Literal["single", "ddp", "fsdp", "deepspeed"]


def training_backend(args: Any = None) -> Backend:
    """Look at TrainingArguments (if given), accelerate's environment and accelerate's state, in this order."""
    if args is not None:
        if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
            return "deepspeed"
        if getattr(args, "fsdp", None) or getattr(args, "fsdp_plugin_args", None):
            return "fsdp"
    for name in ("deepspeed", "fsdp"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() in ("1", "true", "yes"):
            return name
    state = sys.modules.get("accelerate.state")
    shared = getattr(getattr(state, "AcceleratorState", None), "_shared_state", {})
    kind = str(shared.get("distributed_type", "")).rsplit(".", 1)[-1].lower()
    if kind in ("deepspeed", "fsdp"):
        return kind  # type: ignore[return-value]
    return "ddp" if "WORLD_SIZE" in os.environ else "single"  # a launcher's only process is wrapped, too


def check_averaged(model: Any, args: Any) -> None:
    """Raise ``OptionError`` where accelerate leaves a model without DDP, so that each process trains one of its own.

    Args:
        model: that is trained, not wrapped.
        args: the Trainer's ``TrainingArguments``.
    """
    # An evaluation before training marks the model itself as prepared; training then does not wrap it any more.
    prepared = getattr(model, "_is_accelerate_prepared", False)
    if prepared and training_backend(args) == "ddp" and args.world_size > 1:
        got = f"a call before train() on {args.world_size} processes, after which accelerate does not average gradients"
        way_out = "Set eval_on_start=True, or evaluate by another Trainer."
        raise OptionError("Trainer.evaluate", got, "the first evaluation during or after training", way_out)
