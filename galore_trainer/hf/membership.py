"""Whether an optimizer holds what its model trains: compared by identity, as a replaced weight keeps its name."""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from galore_trainer.errors import OptionError
from galore_trainer.layouts.dtensor import is_dtensor
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.guards import some_of

logger = logging.getLogger(__name__)
EMPTY_STEPS = 2
"""Steps without a gradient after which an optimizer that never saw one raises; one step alone may be a scheduler's."""


class Membership:
    """Compares the trained weights of a model with those of its optimizer, at the start and again in every step.

    The first comparison is by identity over all weights. Later ones look whether a module, a weight or a
    ``requires_grad`` was replaced (0.2 ms for 300 weights on a slow CPU, no device) and compare again only then.

    Args:
        model: as it is trained.
        optimizer: the ``GaLoreAdamW`` inside whatever wraps it.
        backend: see ``training_backend``.
    """

    def __init__(self, model: nn.Module, optimizer: GaLoreAdamW, backend: str) -> None:
        self.model, self.optimizer, self.backend = model, optimizer, backend
        self._modules: list[nn.Module] = []
        self._seen: list[list[Any]] = []

    def check(self) -> None:
        """Compare what is new.

        Raises:
            OptionError: a weight trains that the optimizer does not hold, or the optimizer holds one that the model
                does not have; both are named.
        """
        if self._seen and not self._changed():
            return
        held = held_weights(self.optimizer)
        named: list[tuple[str, nn.Parameter]] = list(self.model.named_parameters())
        if self.backend == "fsdp" and not all(is_dtensor(p) for _, p in named):
            return  # between a forward and its backward pass whole weights stand in the place of the shards
        loose = [name for name, p in named if p.requires_grad and id(p) not in held]
        own = {id(p) for _, p in named}
        foreign = [name for key, (name, _) in held.items() if key not in own]
        if loose or foreign:
            raise _differ(loose, foreign)
        frozen = [name for name, p in held.values() if not p.requires_grad]
        if frozen:
            logger.warning("the optimizer holds frozen weights, which stay as they are: %s", some_of(frozen))
        self._modules = list(self.model.modules())
        self._seen = self._look()

    def _look(self) -> list[list[Any]]:
        children = [child for module in self._modules for child in module._modules.values()]
        weights = [p for module in self._modules for p in module._parameters.values()]
        return [children, weights, [p is not None and p.requires_grad for p in weights]]

    def _changed(self) -> bool:
        pairs = zip(self._look(), self._seen, strict=True)
        return any(len(now) != len(seen) or not all(map(operator.is_, now, seen)) for now, seen in pairs)


def held_weights(optimizer: GaLoreAdamW) -> dict[int, tuple[str, Tensor]]:
    """Name and tensor of every weight of the model that an optimizer moves, by ``id``."""
    return {id(p): (name, p) for name, p in optimizer.model_weights()}


def watch_first_steps(optimizer: GaLoreAdamW, model: nn.Module) -> None:
    """Let the first steps of an optimizer notice that it was built for another model, or before some of its weights.

    It costs nothing once a weight has had a gradient, and needs no ``GaLoreCallback``.

    Raises:
        OptionError: (at ``step``) no weight of the optimizer had a gradient in its first two steps.
    """
    asked, steps = weakref.ref(model), 0

    def look(optimizer: Any, args: Any, kwargs: Any) -> None:
        nonlocal steps
        if steps < 0:
            return
        steps += 1
        if optimizer.state:
            steps = -1
            held, trained = held_weights(optimizer), asked()
            named: Any = trained.named_parameters() if trained is not None else ()
            loose = [name for name, p in named if p.grad is not None and id(p) not in held]
            if loose:
                logger.warning(
                    "these weights have gradients and are not in the optimizer, which was built before them: %s",
                    some_of(loose),
                )
        elif steps == EMPTY_STEPS:
            got = f"{EMPTY_STEPS} steps in which none of its weights had a gradient"
            raise OptionError("optimizer", got, "the weights of the model that is trained", BUILD_LAST)

    optimizer.register_step_post_hook(look)


BUILD_LAST = (
    "Build it last, from the model that the Trainer gets (after get_peft_model, a new head, unfreezing, "
    "load_state_dict(assign=True)); galore_plugin builds it when training starts."
)
FREEZE = (
    "Or freeze what is not to be trained: requires_grad_(False). What is to be unfrozen later has to require gradients "
    "while the optimizer is built."
)


def _differ(loose: Sequence[str], foreign: Sequence[str]) -> OptionError:
    says = []
    if loose:
        says.append(f"a model that trains {some_of(loose)} without it")
    if foreign:
        says.append(f"weights that the model does not have: {some_of(foreign)}")
    way_out = f"{BUILD_LAST} {FREEZE}" if loose and not foreign else BUILD_LAST
    return OptionError("optimizer", "; ".join(says), "every weight that the model trains, and no other", way_out)
