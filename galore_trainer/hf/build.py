"""Two ways into the Hugging Face Trainer: ``optimizers=(build_optimizer(...), None)`` and ``**galore_plugin(...)``."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from galore_trainer.config import GaLoreConfig, check_settings
from galore_trainer.errors import OptionError
from galore_trainer.hf.arguments import check_ignored, optimizer_settings
from galore_trainer.hf.backend import Backend, training_backend
from galore_trainer.hf.callback import GaLoreCallback
from galore_trainer.hf.checkpoints import check_layout
from galore_trainer.hf.membership import watch_first_steps
from galore_trainer.hf.unpickling import check_checkpoint
from galore_trainer.layouts.shard import Ranks
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.targets.groups import Weight, parameter_groups, plan_weights
from galore_trainer.targets.names import logical_name

logger = logging.getLogger(__name__)


def build_optimizer(
    model: nn.Module,
    config: GaLoreConfig | None = None,
    *,
    lr: float = 1e-4,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int = 42,
) -> GaLoreAdamW:
    """The optimizer for ``Trainer(optimizers=(build_optimizer(model, config), None))``, on one process or under DDP.

    Args:
        model: a transformers model (or any module whose ``config`` tells its heads).
        config: how to project; ``GaLoreConfig()`` if None.
        lr: learning rate as for AdamW; projected weights move with ``lr * config.scale``, the others with
            ``lr * config.plain_lr_ratio``.
        weight_decay: decoupled; biases and norms are left out by the Trainer's own rule.
        betas, eps: as in ``torch.optim.AdamW``.
        seed: seeds the random parts; give the Trainer's, so that runs differ as the Trainer's do.

    Raises:
        OptionError: settings that do not fit the model, or a process set up for DeepSpeed or FSDP, where the Trainer
            drops or refuses ``optimizers=``; at the second ``step()``, if no weight has had a gradient, as those of
            another model are trained.
    """
    backend = training_backend()
    if backend in ("deepspeed", "fsdp"):
        raise OptionError(
            "optimizers", f"an optimizer built beforehand, under {backend}", "one process or DDP",
            f"Under {backend} the Trainer drops or refuses optimizers=; use Trainer(**galore_plugin(config, args)).",
        )  # fmt: skip
    config = config or GaLoreConfig()
    _check_layerwise(config, backend)
    optimizer = _build(model, config, lr, weight_decay, betas, eps, seed)
    watch_first_steps(optimizer, model)
    return optimizer


def galore_plugin(config: GaLoreConfig, args: Any) -> dict[str, Any]:
    """Keyword arguments that put GaLore+ into any Trainer: ``Trainer(..., **galore_plugin(config, args))``.

    Args:
        config: how to project.
        args: the Trainer's ``TrainingArguments`` (TRL's configs too). When the Trainer makes the optimizer, their
            learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon and seed are honoured as they are then,
            and the Trainer's rule for what is not decayed: ``hyperparameter_search`` may change them.

    Returns:
        ``optimizer_cls_and_kwargs`` and ``callbacks``. To pass callbacks of your own, add them to that list.
        A Trainer without the parameter ``optimizer_cls_and_kwargs`` (``Seq2SeqTrainer`` of some versions) raises a
        ``TypeError`` for it. On one process and under DDP it takes
        ``optimizers=(build_optimizer(model, config, lr=...), None), callbacks=[GaLoreCallback()]`` instead.

    Raises:
        OptionError: ``optim``, ``optim_args`` or ``optim_target_modules`` are set (they would be ignored), or a setting
            that sharded weights do not allow under FSDP or DeepSpeed; ``resume_from_checkpoint`` names a checkpoint of
            another launch, of weights only, or one that ``check_checkpoint`` refuses.
    """
    config = _fitting(config, args)
    resume = getattr(args, "resume_from_checkpoint", None)
    if isinstance(resume, str) and os.path.isdir(resume):
        check_layout(resume, args)
        check_checkpoint(resume, "resume_from_checkpoint")
    settings = {"config": config, "args": args}
    return {"optimizer_cls_and_kwargs": (GaLoreFactory, settings), "callbacks": [GaLoreCallback(plugin=settings)]}


def _fitting(config: GaLoreConfig, args: Any) -> GaLoreConfig:
    """The configuration under these arguments; ``OptionError`` where they ask for what cannot be had together."""
    check_ignored(args)
    backend = training_backend(args)
    if backend in ("deepspeed", "fsdp"):
        config = for_shards(config, backend)
        _check_deepspeed(args)
    _check_layerwise(config, backend, fp16=getattr(args, "fp16", False))
    return config


def for_shards(config: GaLoreConfig, backend: str) -> GaLoreConfig:
    """The configuration where weights are cut into rows: projected on the right, whatever their shape, with a note.

    Raises:
        OptionError: a setting that needs whole weights.
    """
    check_settings(config, backend)
    if config.proj_type != "right":
        if os.environ.get("RANK", "0") == "0":
            logger.warning("%s cuts weights into rows: proj_type %s becomes right", backend, config.proj_type)
        config = dataclasses.replace(config, proj_type="right")
    return config


def _check_deepspeed(args: Any) -> None:
    """Raise ``OptionError`` where DeepSpeed would build an optimizer of its own."""
    settings = getattr(getattr(args, "hf_deepspeed_config", None), "config", None) or {}
    if "optimizer" in settings:
        raise OptionError(
            "deepspeed.optimizer", settings["optimizer"].get("type", "given"), "no optimizer block",
            "Remove it from the DeepSpeed JSON: galore_plugin brings the optimizer.",
        )  # fmt: skip
    if settings.get("checkpoint", {}).get("load_universal"):
        raise OptionError(
            "deepspeed.checkpoint.load_universal", True, "false: the universal format knows AdamW's moments alone",
            "For another stage or number of processes: galore-ft state export, then galore-ft state import.",
        )  # fmt: skip


def _check_layerwise(config: GaLoreConfig, backend: Backend, *, fp16: bool = False) -> None:
    """Refuse layer-wise mode where something else looks at whole gradients between backward and the step."""
    if config.layerwise and backend in ("fsdp", "deepspeed"):
        raise OptionError(
            "galore.layerwise", f"true, under {backend}", "one process or DDP",
            f"{backend} reduces whole gradients, which layer-wise mode does not keep; its shards are small without it.",
        )  # fmt: skip
    if config.layerwise and fp16:
        raise OptionError("galore.layerwise", "true, with fp16", "bf16 or float32", "fp16 rescales whole gradients.")


class GaLoreFactory:
    """What the Trainer calls once it has the model: ``GaLoreFactory()(model, config=..., args=...)``."""

    def __call__(self, model: nn.Module, *, config: GaLoreConfig, args: Any) -> GaLoreAdamW:
        """Build the optimizer from ``TrainingArguments`` as they are now; raises what ``galore_plugin`` raises."""
        return _build(model, _fitting(config, args), **optimizer_settings(args))


def galore_groups(model: nn.Module, config: GaLoreConfig, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of a model under the Trainer's rule for what is not decayed; see ``parameter_groups``."""
    return _groups_of(model, plan_weights(model, config), config, lr, weight_decay)


def _groups_of(
    model: nn.Module, weights: list[Weight], config: GaLoreConfig, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    from transformers import Trainer

    decayed = {logical_name(n) for n in Trainer.get_decay_parameter_names(None, model)}  # type: ignore[arg-type]
    no_decay = {w.name for w in weights} - decayed
    return parameter_groups(weights, config, lr=lr, weight_decay=weight_decay, no_decay=no_decay)


def _build(
    model: nn.Module,
    config: GaLoreConfig,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    seed: int,
) -> GaLoreAdamW:
    weights = plan_weights(model, config)
    groups = _groups_of(model, weights, config, lr, weight_decay)
    optimizer = GaLoreAdamW(groups, config, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, seed=seed)
    optimizer.notes = {w.name: w.note for w in weights if w.note}
    if training_backend() == "ddp" and dist.is_available() and dist.is_initialized():  # a single process is wrapped too
        if config.layerwise:
            projected = {id(p) for _, p in optimizer.projected_weights()}
            names = [name for name, p in model.named_parameters() if id(p) in projected]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        if dist.get_world_size() > 1:
            optimizer.replicate_over(Ranks(None))
    return optimizer
