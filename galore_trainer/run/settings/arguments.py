"""From a ``RunConfig`` to the Trainer's arguments: what ``auto`` means on this machine."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from galore_trainer.errors import OptionError, one_line
from galore_trainer.run.device import device_type, use_one_device, uses_bf16
from galore_trainer.run.settings.methods import METHODS, check_backend, require_package

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from galore_trainer.recipes.base import Example
    from galore_trainer.run.settings.run_config import RunConfig

logger = logging.getLogger(__name__)
MANY_STEPS = 1 << 20  # the trial of a schedule must be longer than any warm-up or decay
# Fields that newer versions of transformers rename. The user may write either name.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Module and package of each attention that is not torch's.
FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
RUN_DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "logging_steps": 10,
    "save_total_limit": 2,
    "save_steps": 100,
    "logging_nan_inf_filter": False,
    "disable_tqdm": True,
}
"""TrainingArguments fields a run sets below the user's own; ``training/progress.py`` shows progress."""


def run_arguments(config: RunConfig) -> TrainingArguments:
    """``training_arguments`` of a run that is trained here, with a run's own defaults.

    Raises:
        OptionError: a setting under which a failure would not be seen, or anything ``training_arguments`` refuses.
    """
    arguments = training_arguments(config, **RUN_DEFAULTS)
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
    cls, below = arguments_class(config)
    fields = {**below, **more, **config.training}
    fields.pop("push_to_hub", None)  # results/publish.py uploads the model; the Trainer would upload all of output_dir
    device = device_type(use_cpu=bool(fields.get("use_cpu")))
    if fields.get("bf16") == "auto":
        fields["bf16"] = not fields.get("fp16") and uses_bf16("auto", device)
    if fields.get("bf16") and device == "cpu":
        fields["use_cpu"] = True  # transformers refuses bf16 on a machine without GPU unless the CPU is asked for
    if device == "cpu":
        fields.setdefault("dataloader_pin_memory", False)  # which torch would ignore, with a warning
    names = {field.name for field in dataclasses.fields(cls)}
    for old, new in RENAMED.items():
        if new in names and fields.get(old) is not None and fields.get(new) is None:
            fields[new], fields[old] = fields[old], None
    try:
        arguments = cls(output_dir=config.output_dir, **fields)
    except Exception as error:  # whatever it raises: these are a user's settings
        named = [name for name in config.training if name in str(error)]
        got = {name: config.training[name] for name in named} or config.training
        option = named[0] if len(named) == 1 else "training arguments"
        way_out = f"It says: {one_line(error)}"
        raise OptionError(option, got, "settings that transformers accepts", way_out) from error
    _check_scheduler(arguments)
    if warning := use_one_device(arguments):
        logger.warning(warning)
    return arguments


def arguments_class(config: RunConfig) -> tuple[type[TrainingArguments], dict[str, Any]]:
    """The class of the trainer's arguments, and the fields it must be given below the user's own.

    ``trl.SFTConfig`` has defaults of its own (bf16, gradient checkpointing, learning rate, ...); a run has those of
    TrainingArguments whichever loop it is trained by.

    Raises:
        OptionError: trl is not installed.
    """
    from transformers import TrainingArguments

    if config.trainer == "hf":
        return TrainingArguments, {}
    require_package("trainer", "trl", "trl", "trl")
    from trl import SFTConfig

    trl_defaults = {f.name: f.default for f in dataclasses.fields(SFTConfig)}
    defaults = {
        f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.init and f.default != trl_defaults[f.name]
    }
    padding_free = config.training.get("padding_free", False)
    # No row exceeds max_length, so TRL truncates nothing. With padding-free batches and no packing TRL wants None.
    length = config.max_length if config.packing or not padding_free else None
    return SFTConfig, {**defaults, "max_length": length, "completion_only_loss": True, "packing": config.packing}


def _check_scheduler(arguments: TrainingArguments) -> None:
    """Build the learning rate's schedule once, so that an unknown setting is refused before training."""
    import torch
    from transformers import get_scheduler

    written, kind = arguments.lr_scheduler_kwargs, arguments.lr_scheduler_type
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=arguments.learning_rate)
    try:
        settings = dict((json.loads(written) if isinstance(written, str) else written) or {})
        get_scheduler(
            kind, optimizer, num_warmup_steps=1, num_training_steps=MANY_STEPS, scheduler_specific_kwargs=settings
        )
    except Exception as error:
        name = getattr(kind, "value", kind)
        way_out = f"It says: {one_line(error)}"
        raise OptionError("lr_scheduler_kwargs", written, f"settings of the schedule {name!r}", way_out) from error


def check_method(config: RunConfig, arguments: TrainingArguments) -> None:
    """Refuse a method or an attention whose package, device or kind of launch is not there, before anything is loaded.

    Raises:
        OptionError: naming what is missing and the way out.
    """
    from galore_trainer.hf.backend import check_clipping, training_backend

    sixteen_bits = bool(arguments.bf16 or arguments.fp16)
    check_attention(config, arguments.device.type, sixteen_bits=sixteen_bits)
    spec = METHODS[config.method]
    if spec.package:
        require_package("method", config.method, spec.package, spec.extra)
    if spec.cuda and arguments.device.type != "cuda":
        device = f"{config.method} on {arguments.device.type}"
        raise OptionError("method", device, "an NVIDIA GPU for this method", "Here, use --method adamw.")
    check_backend(config.method, training_backend(arguments))
    if spec.block == "galore":
        check_clipping(config.galore, arguments)


def check_attention(config: RunConfig, device: str, *, sixteen_bits: bool) -> None:
    """Refuse an ``attn_implementation`` that this machine cannot compute.

    Args:
        config: of the run.
        device: its kind: ``cuda``, ``cpu``, ...
        sixteen_bits: whether the model computes in bfloat16 or float16 whatever its weights are.

    Raises:
        OptionError: naming what is missing and the way out.
    """
    attention = config.attn_implementation
    way_out = "Use attn_implementation=sdpa, which needs no package and no GPU."
    if attention in FLASH_PACKAGES:
        module, package = FLASH_PACKAGES[attention]
        # transformers takes the same kernels from the hub where the package kernels is installed
        if all(importlib.util.find_spec(name) is None for name in (module, "kernels")):
            wanted = f"the package {package} installed"
            raise OptionError(
                "attn_implementation", attention, wanted, f"Install it on a machine with a GPU. {way_out}"
            )
    if attention in (*FLASH_PACKAGES, "flex_attention") and device == "cpu":
        raise OptionError("attn_implementation", attention, "a GPU for this attention", way_out)
    if attention in FLASH_PACKAGES and config.dtype == "float32" and not sixteen_bits:
        wanted = "computing in 16 bits, the only precision of this attention"
        raise OptionError("attn_implementation", attention, wanted, f"Add bf16=true or dtype=bfloat16. {way_out}")


def check_samples(config: RunConfig, held_out: Sequence[Example] | None = None, *, sharded: bool = False) -> None:
    """Refuse ``eval.samples`` where no process has a whole model, or where there are fewer prompts.

    Args:
        config: of the run.
        held_out: the examples to evaluate on, once they are loaded.
        sharded: whether each process keeps a part of the weights.

    Raises:
        OptionError: with the way out.
    """
    option, samples = "eval.samples", config.eval.samples
    if samples and sharded:
        way_out = "Use --launch-config ddp, zero1 or zero2, or leave it out: the scores before and after remain."
        raise OptionError(option, samples, "whole weights on each process, which FSDP2 and ZeRO-3 cut", way_out)
    if held_out is not None and len(sampled(config, held_out)) < samples:
        most = f"at most {sum(map(has_prompt, held_out))}, the held-out examples with a prompt"
        raise OptionError(option, samples, most, "Hold out more with data.eval_samples, or ask for fewer.")


def sampled(config: RunConfig, held_out: Iterable[Example]) -> list[Example]:
    """The examples of ``eval.samples``: the first that are held out."""
    return list(itertools.islice(filter(has_prompt, held_out), config.eval.samples))


def has_prompt(example: Example) -> bool:
    """Whether there is something to answer; a raw text asks nothing."""
    return bool(example.messages)
