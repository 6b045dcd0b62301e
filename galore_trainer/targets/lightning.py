"""Modules of Lightning, recognised by their methods, so that Lightning need not be installed."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from galore_trainer.errors import OptionError

MANUAL = (
    "Layer-wise mode needs manual optimization: set self.automatic_optimization = False, and in training_step call "
    "self.manual_backward(loss), then step() and zero_grad() of self.optimizers()."
)


def is_lightning(module: Any) -> bool:
    """Whether this is a ``LightningModule``."""
    methods = ("training_step", "configure_optimizers", "automatic_optimization")
    return isinstance(module, nn.Module) and all(hasattr(module, name) for name in methods)


def inner_model(module: nn.Module) -> nn.Module:
    """The model inside a ``LightningModule``, if it has every weight that trains; otherwise the module itself.

    The model knows its embeddings, and its weights have the names that patterns of ``GaLoreConfig`` and other Trainers
    use.
    """
    if not is_lightning(module):
        return module
    direct = any(p.requires_grad for p in module.parameters(recurse=False))
    trained = [child for child in module.children() if any(p.requires_grad for p in child.parameters())]
    return trained[0] if len(trained) == 1 and not direct else module


def check_layerwise(module: Any) -> None:
    """Raise ``OptionError`` where Lightning runs backward inside ``step()``, or has wrapped the module in DDP already.

    Args:
        module: a ``LightningModule`` that is to train in layer-wise mode.
    """
    if module.automatic_optimization:
        got = "true, under Lightning's automatic optimization"
        raise OptionError("galore.layerwise", got, "manual optimization", MANUAL)
    if dist.is_available() and dist.is_initialized():
        got = "true, under Lightning on several processes"
        way_out = "Lightning's DDP averages whole gradients: use the Hugging Face Trainer with attach, or one process."
        raise OptionError("galore.layerwise", got, "one process", way_out)


def run_closure_first(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Step pre-hook: run Lightning's closure before ``step()``, which takes none in layer-wise mode.

    Under manual optimization too Lightning passes a closure, which calls its hooks and does not run backward.
    """
    if (closure := kwargs.pop("closure", None)) is not None:
        closure()
    return args, kwargs
