"""The distributed backend that the Trainer of this process will use, and the settings that each backend allows."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from typing import Any, Literal

from galore_trainer.config import GaLoreConfig, check_settings
from galore_trainer.errors import OptionError
from galore_trainer.optim.lookup import check_sees_all

logger = logging.getLogger(__name__)
Backend = Literal["single", "ddp", "fsdp", "deepspeed"]
SHARDING = ("fsdp", "deepspeed")
"""Backends that cut weights or optimizer state into shards."""


def training_backend(args: Any = None) -> Backend:
    """The backend by ``TrainingArguments``, if given, then by accelerate's environment, then by accelerate's state."""
    if args is not None:
        if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
            return "deepspeed"
        if getattr(args, "fsdp", None) or getattr(args, "fsdp_plugin_args", None):
            return "fsdp"
    for name in ("deepspeed", "fsdp"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() in ("1", "true", "yes"):
            return name
    # accelerate has a state only where something has imported it; importing it here would not give it one
    state = sys.modules.get("accelerate.state")
    shared = getattr(getattr(state, "AcceleratorState", None), "_shared_state", {})
    kind = str(shared.get("distributed_type", "")).rsplit(".", 1)[-1].lower()
    if kind in SHARDING:
        return kind  # type: ignore[return-value]
    # a launcher sets WORLD_SIZE, and accelerate wraps the model in DDP even where it is 1
    return "ddp" if "WORLD_SIZE" in os.environ else "single"


def fitted_config(config: GaLoreConfig, args: Any) -> GaLoreConfig:
    """The configuration under the backend that ``TrainingArguments`` ask for.

    Raises:
        OptionError: a setting that the backend does not allow.
    """
    backend = training_backend(args)
    if backend in SHARDING:
        config = for_shards(config, backend)
        _check_deepspeed(args)
    check_layerwise(config, backend, fp16=getattr(args, "fp16", False))
    check_clipping(config, args)
    return config


def for_shards(config: GaLoreConfig, backend: str) -> GaLoreConfig:
    """The configuration where weights are cut into rows: ``proj_type`` becomes ``right``, and the log says so.

    Raises:
        OptionError: a setting that needs whole weights.
    """
    check_settings(config, backend)
    if backend == "deepspeed":
        check_sees_all(config)
    if config.proj_type != "right":
        if os.environ.get("RANK", "0") == "0":
            logger.warning("%s cuts weights into rows: proj_type %s becomes right", backend, config.proj_type)
        config = dataclasses.replace(config, proj_type="right")
    return config


def check_layerwise(config: GaLoreConfig, backend: Backend, *, fp16: bool = False) -> None:
    """Raise ``OptionError`` for layer-wise mode where the Trainer or its backend works on whole gradients."""
    if config.layerwise and backend in SHARDING:
        raise OptionError(
            "galore.layerwise",
            f"true, under {backend}",
            "one process or DDP",
            f"{backend} reduces whole gradients, which layer-wise mode does not keep; its shards are small without it.",
        )
    if config.layerwise and fp16:
        raise OptionError("galore.layerwise", "true, with fp16", "bf16 or float32", "fp16 rescales whole gradients.")


def check_clipping(config: GaLoreConfig, args: Any) -> None:
    """Raise ``OptionError`` where the Trainer would clip gradients, too."""
    limit = getattr(args, "max_grad_norm", None)
    if config.max_grad_norm is not None and limit:
        raise OptionError(
            "galore.max_grad_norm",
            f"{config.max_grad_norm} beside max_grad_norm {limit} of the Trainer",
            "one of them",
            "Set max_grad_norm: 0, so that the step alone clips, or leave galore.max_grad_norm unset.",
        )


def _check_deepspeed(args: Any) -> None:
    """Raise ``OptionError`` where DeepSpeed would build its own optimizer or load AdamW's moments alone."""
    settings = getattr(getattr(args, "hf_deepspeed_config", None), "config", None) or {}
    if "optimizer" in settings:
        raise OptionError(
            "deepspeed.optimizer",
            settings["optimizer"].get("type", "given"),
            "no optimizer block",
            "Remove it from the DeepSpeed JSON: GaLore+ brings the optimizer.",
        )
    if settings.get("checkpoint", {}).get("load_universal"):
        raise OptionError(
            "deepspeed.checkpoint.load_universal",
            True,
            "false: the universal format knows AdamW's moments alone",
            "For another stage or number of processes: galore-ft state export, then galore-ft state import.",
        )


def check_averaged(model: Any, args: Any) -> None:
    """Raise ``OptionError`` where accelerate leaves a model without DDP, so that processes do not average gradients.

    Args:
        model: the model that is trained, without wrappers.
        args: the Trainer's ``TrainingArguments``.
    """
    # accelerate marks a model as prepared when it is evaluated before training, and does not wrap it afterwards
    prepared = getattr(model, "_is_accelerate_prepared", False)
    if prepared and training_backend(args) == "ddp" and args.world_size > 1:
        got = f"a call before train() on {args.world_size} processes, after which accelerate does not average gradients"
        way_out = "Set eval_on_start=True, or evaluate by another Trainer."
        raise OptionError("Trainer.evaluate", got, "the first evaluation during or after training", way_out)
