"""Check that an optimizer holds the weights that its model trains.

Weights are compared by identity, because a replaced weight keeps its name.
"""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from galore_trainer.errors import OptionError
from galore_trainer.layouts.find import is_cut
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.guards import some_of

logger = logging.getLogger(__name__)
EMPTY_STEPS = 2
"""Steps without any gradient after which an optimizer raises; schedulers may call ``step()`` once before training."""


class Membership:
    """Compares the trained weights of a model with those of its optimizer, at the start and again in every step.

    The first check compares all weights. Later checks compare again only where a module or weight was replaced or a
    ``requires_grad`` changed since; to find that out takes 0.2 ms for 300 weights on a slow CPU and no device.

    Args:
        model: the model that is trained, with its wrappers.
        optimizer: the ``GaLoreAdamW`` without the Trainer's wrappers.
        backend: see ``training_backend``.
    """

    def __init__(self, model: nn.Module, optimizer: GaLoreAdamW, backend: str) -> None:
        self.model, self.optimizer, self.backend = model, optimizer, backend
        self._modules: list[nn.Module] = []
        self._snapshot: list[list[Any]] = []

    def check(self) -> None:
        """Compare the weights, if this is the first check or something has changed since the last one.

        Raises:
            OptionError: a weight trains that the optimizer does not hold, or the optimizer holds a weight that the
                model does not have; both are named.
        """
        if self._snapshot and not self._has_changed():
            return
        optimized = optimized_weights(self.optimizer)
        named: list[tuple[str, nn.Parameter]] = list(self.model.named_parameters())
        if self.backend == "fsdp" and not all(is_cut(p) for _, p in named):
            return  # between a forward and its backward pass FSDP2 puts whole weights in the place of the shards
        loose = [name for name, p in named if p.requires_grad and id(p) not in optimized]
        in_model = {id(p) for _, p in named}
        foreign = [name for key, (name, _) in optimized.items() if key not in in_model]
        if loose or foreign:
            raise _membership_error(loose, foreign)
        frozen = [name for name, p in optimized.values() if not p.requires_grad]
        if frozen:
            logger.warning("the optimizer holds frozen weights, which stay as they are: %s", some_of(frozen))
        self._modules = list(self.model.modules())
        self._snapshot = self._take_snapshot()

    def _take_snapshot(self) -> list[list[Any]]:
        """The submodules, the weights and their ``requires_grad``, in a fixed order."""
        # this runs in every step: reading the modules' dictionaries is faster than named_parameters()
        children = [child for module in self._modules for child in module._modules.values()]
        weights = [p for module in self._modules for p in module._parameters.values()]
        return [children, weights, [p is not None and p.requires_grad for p in weights]]

    def _has_changed(self) -> bool:
        pairs = zip(self._take_snapshot(), self._snapshot, strict=True)
        return any(len(now) != len(before) or not all(map(operator.is_, now, before)) for now, before in pairs)


def optimized_weights(optimizer: GaLoreAdamW) -> dict[int, tuple[str, Tensor]]:
    """Name and tensor of every weight of the model that an optimizer updates, by ``id`` of the tensor."""
    return {id(p): (name, p) for name, p in optimizer.model_weights()}


def watch_first_steps(optimizer: GaLoreAdamW, model: nn.Module) -> None:
    """Check after the first steps that the optimizer was built for the model that is trained, with its present weights.

    The check ends with the first step in which a weight had a gradient. It works without ``GaLoreCallback``.

    Raises:
        OptionError: at ``step()``: no weight of the optimizer had a gradient in its first two steps.
    """
    # a strong reference in the hook would keep the model alive as long as the optimizer
    model_ref, steps = weakref.ref(model), 0

    def check(optimizer: Any, args: Any, kwargs: Any) -> None:
        nonlocal steps
        if steps < 0:  # the check has ended
            return
        steps += 1
        if optimizer.state:
            steps = -1
            optimized, trained = optimized_weights(optimizer), model_ref()
            named: Any = trained.named_parameters() if trained is not None else ()
            loose = [name for name, p in named if p.grad is not None and id(p) not in optimized]
            if loose:
                logger.warning(
                    "these weights have gradients and are not in the optimizer, which was built before them: %s",
                    some_of(loose),
                )
        elif steps == EMPTY_STEPS:
            got = f"{EMPTY_STEPS} steps in which none of its weights had a gradient"
            raise OptionError("optimizer", got, "the weights of the model that is trained", BUILD_LAST)

    optimizer.register_step_post_hook(check)


BUILD_LAST = (
    "Build it last, from the model that the Trainer gets (after get_peft_model, a new head, unfreezing, "
    "load_state_dict(assign=True)); attach and galore_plugin build it when training starts."
)
FREEZE = (
    "Or freeze what is not to be trained: requires_grad_(False). What is to be unfrozen later has to require gradients "
    "while the optimizer is built."
)


def _membership_error(loose: Sequence[str], foreign: Sequence[str]) -> OptionError:
    """The error for weights that train outside the optimizer (``loose``) or are not in the model (``foreign``)."""
    causes = []
    if loose:
        causes.append(f"a model that trains {some_of(loose)} without it")
    if foreign:
        causes.append(f"weights that the model does not have: {some_of(foreign)}")
    # where the model has other weights, freezing does not help
    way_out = f"{BUILD_LAST} {FREEZE}" if loose and not foreign else BUILD_LAST
    return OptionError("optimizer", "; ".join(causes), "every weight that the model trains, and no other", way_out)
