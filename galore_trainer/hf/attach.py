"""``attach(trainer, config)``: GaLore+ for a Trainer that exists, whatever its ``__init__`` takes.

It adds what ``galore_plugin`` returns to the Trainer, which makes the optimizer when training starts.
"""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import Trainer

from galore_trainer.config import ALL_LINEAR, GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.hf.build import GaLoreFactory, galore_plugin
from galore_trainer.hf.callback import GaLoreCallback
from galore_trainer.targets.causes import adapters_alone
from galore_trainer.targets.lightning import MANUAL, is_lightning
from galore_trainer.targets.names import logical_name

AnyTrainer = TypeVar("AnyTrainer")


def attach(trainer: AnyTrainer, config: GaLoreConfig | None = None) -> AnyTrainer:
    """Let a Trainer train with GaLore+: ``attach(DPOTrainer(model, args=args, ...), config).train()``.

    Use: for a Trainer whose ``__init__`` has no ``optimizer_cls_and_kwargs``, as most of TRL's, or which other code
    makes. Call it before ``train()``. It works on one process, under DDP, FSDP2 and DeepSpeed.

    Args:
        trainer: a ``transformers.Trainer`` or an instance of any subclass, made without an optimizer. Its ``args`` give
            the learning rate and the other settings of the optimizer, as ``galore_plugin`` describes.
        config: how to project; ``GaLoreConfig()`` if None.

    Returns:
        The same Trainer. Its model is read when training starts, so weights may be frozen or unfrozen until then.

    Raises:
        OptionError: something that is no ``transformers.Trainer``; a Trainer that has trained, has an optimizer, a
            scheduler or GaLore+ already, or trains adapters alone; arguments that ``galore_plugin`` refuses. The
            Trainer stays as it was. When training starts: the Trainer's class overrides ``create_optimizer`` and makes
            another optimizer there.
    """
    config = config if config is not None else GaLoreConfig()
    if not isinstance(trainer, Trainer):
        raise _no_trainer(trainer, config)
    plugin = checked_plugin(trainer, config)
    trainer.optimizer_cls_and_kwargs = plugin["optimizer_cls_and_kwargs"]
    for callback in plugin["callbacks"]:
        trainer.add_callback(callback)
    return trainer


def checked_plugin(trainer: Trainer, config: GaLoreConfig) -> dict[str, Any]:
    """What ``galore_plugin`` returns for a Trainer that exists; the Trainer stays as it is.

    Raises:
        OptionError: as ``attach``.
    """
    if not isinstance(config, GaLoreConfig):
        raise OptionError("config", config, "a GaLoreConfig", "Use attach(trainer, GaLoreConfig(rank=128)).")
    _check_untouched(trainer)
    _check_adapters(trainer.model, config)
    return galore_plugin(config, trainer.args)


def _no_trainer(got: Any, config: Any) -> OptionError:
    """The error for something that is no ``transformers.Trainer``."""
    way_out = "In a loop of your own use optimizer = build_optimizer(model, config, lr=...)."
    if is_lightning(got) or type(got).__module__.split(".")[0] in ("lightning", "pytorch_lightning"):
        way_out = "Return build_optimizer(self, config, lr=...) from the configure_optimizers of the LightningModule."
        if getattr(config, "layerwise", False):
            way_out += f" {MANUAL}"
    return OptionError("trainer", type(got).__name__, "a transformers.Trainer or one of its subclasses", way_out)


def _check_untouched(trainer: Trainer) -> None:
    """Raise ``OptionError`` for a Trainer that has trained, or that has an optimizer, a scheduler or GaLore+."""
    kind = type(trainer).__name__
    brought = "attach brings the optimizer, with the settings of the Trainer's arguments"
    given = trainer.optimizer_cls_and_kwargs
    with_callback = any(isinstance(callback, GaLoreCallback) for callback in trainer.callback_handler.callbacks)
    if with_callback or (given is not None and given[0] is GaLoreFactory):
        way_out = "Call attach once, without galore_plugin, build_optimizer and GaLoreCallback on the same Trainer."
        raise OptionError("trainer", f"a {kind} that has GaLore+ already", "a Trainer without it", way_out)
    if trainer.state.global_step or trainer.is_in_train:
        got = f"a {kind} whose training has begun, at step {trainer.state.global_step}"
        way_out = "Make a new Trainer with the same model and call attach before train()."
        raise OptionError("trainer", got, "a Trainer before its training", way_out)
    if trainer.optimizer is not None:
        got = f"a {kind} that has an optimizer, {type(trainer.optimizer).__name__}"
        way_out = f"Make the Trainer without optimizers=, and do not call create_optimizer: {brought}."
        raise OptionError("optimizers", got, "a Trainer without an optimizer", way_out)
    if trainer.lr_scheduler is not None:
        got = f"a {kind} that has a scheduler, {type(trainer.lr_scheduler).__name__}, of another optimizer"
        way_out = f"Make the Trainer without optimizers= and set lr_scheduler_type in its arguments: {brought}."
        raise OptionError("optimizers", got, "a Trainer without a scheduler", way_out)
    if given is not None:
        got = getattr(given[0], "__name__", repr(given[0]))
        way_out = f"Make the Trainer without it: {brought}."
        raise OptionError("optimizer_cls_and_kwargs", got, "None, beside attach", way_out)


def _check_adapters(model: Any, config: GaLoreConfig) -> None:
    """Raise ``OptionError`` for a model that trains adapters alone, unless ``target_modules`` names them."""
    trained = [logical_name(name) for name, p in model.named_parameters() if p.requires_grad]
    # a frozen model may be unfrozen before training starts
    if trained and config.target_modules == ALL_LINEAR and (error := adapters_alone(model, trained)):
        raise error
