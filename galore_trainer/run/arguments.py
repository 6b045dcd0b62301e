"""From a ``RunConfig`` to the Trainer's arguments: what ``auto`` means on this machine."""

from __future__ import annotations

import logging
import math
import sys
from typing import TYPE_CHECKING, Any

from galore_trainer.errors import OptionError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from galore_trainer.run.config import RunConfig

logger = logging.getLogger(__name__)
RUN_DEFAULTS: dict[str, Any] = {
    "report_to": "none", "logging_steps": 10, "save_total_limit": 2, "save_steps": 100, "logging_nan_inf_filter": False,
}  # fmt: skip
"""TrainingArguments fields a run sets below the user's own."""


def run_arguments(config: RunConfig) -> TrainingArguments:
    """``training_arguments`` of a run that is trained here, with a run's own defaults.

    Raises:
        OptionError: a setting under which a failure would not be seen, or anything ``training_arguments`` refuses.
    """
    arguments = training_arguments(config, **{**RUN_DEFAULTS, "disable_tqdm": not sys.stderr.isatty()})
    if arguments.logging_nan_inf_filter:
        raise OptionError(
            "logging_nan_inf_filter", True, "false, as a run has it", "A loss that is not finite would be shown as 0."
        )
    return arguments


def training_arguments(config: RunConfig, **more: Any) -> TrainingArguments:
    """Build the Trainer's arguments (``trl.SFTConfig`` under ``trainer: trl``): the user's fields verbatim.

    ``bf16: auto`` is decided for this machine; ``push_to_hub`` is not the Trainer's.

    Args:
        config: the run.
        more: further fields, below the user's own.

    Raises:
        OptionError: transformers refuses the combination; its own words are passed on. Or trl is not installed.
    """
    from galore_trainer.run.evaluate import uses_bf16
    from galore_trainer.run.trainers import arguments_class

    cls, below = arguments_class(config)
    fields = {**below, **more, **config.training}
    fields.pop("push_to_hub", None)  # publish.py uploads the model; the Trainer would upload all of output_dir
    for name, value in config.training.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise OptionError(name, value, "a finite number")
    device = device_type(use_cpu=bool(fields.get("use_cpu")))
    if fields.get("bf16") == "auto":
        fields["bf16"] = not fields.get("fp16") and uses_bf16("auto", device)
    if fields.get("bf16") and device == "cpu":
        fields["use_cpu"] = True  # transformers refuses bf16 on a machine without GPU unless the CPU is asked for
    try:
        arguments = cls(output_dir=config.output_dir, **fields)
    except (ValueError, TypeError, ImportError) as error:
        named = [name for name in config.training if name in str(error)]
        got = {name: config.training[name] for name in named} or config.training
        option = named[0] if len(named) == 1 else "training arguments"
        raise OptionError(option, got, "settings that transformers accepts", f"It says: {error}") from error
    if told := use_one_device(arguments):
        logger.warning(told)
    return arguments


def use_one_device(arguments: TrainingArguments) -> str | None:
    """Keep a run that nobody launched on several processes to one GPU; a sentence on it where there are more.

    The Trainer would split each batch over all GPUs in one process (``torch.nn.DataParallel``), which copies the model
    at every step.
    """
    if arguments.n_gpu < 2:
        return None
    found, arguments._n_gpu = arguments.n_gpu, 1
    return f"{found} GPUs are visible, this run uses one: for all of them, galore-ft train ... --num-processes {found}"


def device_type(*, use_cpu: bool = False) -> str:
    """The kind of device a run uses here: ``cuda``, ``mps``, ..., or ``cpu``."""
    import torch

    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"
