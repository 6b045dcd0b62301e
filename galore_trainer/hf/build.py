"""Ways into the Hugging Face Trainer: ``optimizers=(build_optimizer(...), None)`` and ``**galore_plugin(...)``.

From the Trainer to the optimizer:

1. ``galore_plugin`` checks the arguments; the Trainer keeps ``GaLoreFactory`` as its ``optimizer_cls_and_kwargs``.
2. When training starts the Trainer calls ``GaLoreFactory`` with its model.
3. ``plan_weights`` (``targets/groups.py``) decides for each parameter whether it is projected, plain or frozen.
4. ``parameter_groups`` makes groups of the weights, under the Trainer's rule for weight decay.
5. ``GaLoreAdamW`` (``optim/galore_adamw.py``) takes the groups; ``GaLoreCallback`` checks and reports during training.

``build_optimizer`` does steps 3 to 5 at once, before there is a Trainer. ``attach`` (``hf/attach.py``) gives a Trainer
that exists what ``galore_plugin`` returns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.hf.arguments import check_ignored, optimizer_settings
from galore_trainer.hf.backend import SHARDING, check_layerwise, fitted_config, training_backend
from galore_trainer.hf.callback import GaLoreCallback
from galore_trainer.hf.checkpoints import check_resumable, check_settings_of_fsdp, resumed_from
from galore_trainer.hf.membership import watch_first_steps
from galore_trainer.layouts.shard import Ranks
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.param_groups import given_config
from galore_trainer.targets import lightning
from galore_trainer.targets.groups import Weight, parameter_groups, plan_weights
from galore_trainer.targets.names import logical_name


def build_optimizer(
    model: nn.Module,
    config: GaLoreConfig | None = None,
    *,
    lr: float = 1e-4,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int = 42,
    max_grad_norm: float | None = None,
) -> GaLoreAdamW:
    """The optimizer for ``Trainer(optimizers=(build_optimizer(model, config), None))``, on one process or under DDP.

    Args:
        model: a transformers model, or any module; the number of attention heads is read from its ``config``. Of a
            ``LightningModule`` the model inside is taken.
        config: how to project; ``GaLoreConfig()`` if None.
        lr: learning rate as for AdamW; projected weights move with ``lr * config.scale``, the others with
            ``lr * config.plain_lr_ratio``.
        weight_decay: decoupled weight decay; the Trainer's rule leaves out biases and norms.
        betas, eps: as in ``torch.optim.AdamW``.
        seed: seeds the random parts; give the Trainer's seed, so that runs with other seeds differ here too.
        max_grad_norm: the setting of ``config``, which clips inside the step; the Trainer's has to be 0 then.

    Raises:
        OptionError: settings that do not fit the model, or a process set up for DeepSpeed or FSDP, where the Trainer
            drops or refuses ``optimizers=``; layer-wise mode under Lightning's automatic optimization or its DDP. At
            the second ``step()``: no weight has had a gradient, because another model is trained.
    """
    backend = training_backend()
    if backend in SHARDING:
        raise OptionError(
            "optimizers",
            f"an optimizer built beforehand, under {backend}",
            "one process or DDP",
            f"Under {backend} the Trainer drops or refuses optimizers=: make the Trainer without it and call "
            "attach(trainer, config), or use Trainer(**galore_plugin(config, args)).",
        )
    config = given_config(config, max_grad_norm)
    check_layerwise(config, backend)
    layerwise_lightning = config.layerwise and lightning.is_lightning(model)
    if layerwise_lightning:
        lightning.check_layerwise(model)
    optimizer = _build(lightning.inner_model(model), config, lr, weight_decay, betas, eps, seed)
    if layerwise_lightning:
        optimizer.register_step_pre_hook(lightning.run_closure_first)
    watch_first_steps(optimizer, model)
    return optimizer


def galore_plugin(config: GaLoreConfig, args: Any, callbacks: Iterable[Any] = ()) -> dict[str, Any]:
    """Keyword arguments that put GaLore+ into a Trainer: ``Trainer(..., **galore_plugin(config, args))``.

    Args:
        config: how to project.
        args: the Trainer's ``TrainingArguments`` (TRL's configs too). Their learning_rate, weight_decay, adam_beta1,
            adam_beta2, adam_epsilon and seed are read when the Trainer makes the optimizer, because
            ``hyperparameter_search`` may change them. The Trainer's rule decides which weights are not decayed.
        callbacks: your own, or their classes. Pass them here: ``callbacks=`` beside ``**galore_plugin(...)`` would be
            a second argument of that name, a ``TypeError``.

    Returns:
        ``optimizer_cls_and_kwargs`` and ``callbacks``: GaLore+'s callback, then yours. A Trainer without the parameter
        ``optimizer_cls_and_kwargs`` (most of TRL's, ``Seq2SeqTrainer``) raises a ``TypeError`` for it: make it without
        the plugin and call ``attach(trainer, config)``.

    Raises:
        OptionError: ``optim``, ``optim_args`` or ``optim_target_modules`` are set (they would be ignored), or a setting
            that sharded weights do not allow under FSDP or DeepSpeed; ``resume_from_checkpoint`` names a checkpoint of
            another launch, of weights only, or one that ``check_checkpoint`` refuses; ``callbacks`` holds a
            ``GaLoreCallback``.
    """
    others = list(callbacks or ())
    if any(callback is GaLoreCallback or isinstance(callback, GaLoreCallback) for callback in others):
        raise OptionError("callbacks", "a GaLoreCallback", "your own callbacks alone", "galore_plugin adds it.")
    check_ignored(args)
    config = fitted_config(config, args)
    resume = getattr(args, "resume_from_checkpoint", None)
    if isinstance(resume, str):
        check_resumable(resume, args)
    settings = {"config": config, "args": args}
    return {
        "optimizer_cls_and_kwargs": (GaLoreFactory, settings),
        "callbacks": [GaLoreCallback(plugin=settings), *others],
    }


class GaLoreFactory:
    """The Trainer's optimizer "class": the Trainer calls ``GaLoreFactory()(model, config=..., args=...)``.

    Trainers of axolotl call ``GaLoreFactory()(model, their_args, config=..., args=...)``.
    """

    def __call__(self, model: nn.Module, own_args: Any = None, *, config: GaLoreConfig, args: Any) -> GaLoreAdamW:
        """Build the optimizer from ``TrainingArguments`` as they are now.

        Raises:
            OptionError: as ``galore_plugin``; the Trainer resumes a checkpoint of FSDP2 that has other settings.
        """
        args = args if own_args is None else own_args
        check_ignored(args)
        optimizer = _build(model, fitted_config(config, args), **optimizer_settings(args))
        if training_backend(args) == "fsdp" and (checkpoint := resumed_from()):
            check_settings_of_fsdp(checkpoint, optimizer.param_groups)
        return optimizer


def galore_groups(model: nn.Module, config: GaLoreConfig, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of a model under the Trainer's rule for weight decay; see ``parameter_groups``."""
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
    if training_backend() == "ddp" and dist.is_available() and dist.is_initialized():
        if config.layerwise:
            # DDP, which wraps a single process too, would keep whole gradients; the optimizer averages projected ones
            projected = {id(p) for _, p in optimizer.projected_weights()}
            names = [name for name, p in model.named_parameters() if id(p) in projected]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        if dist.get_world_size() > 1:
            optimizer.replicate_over(Ranks(None))
    return optimizer
