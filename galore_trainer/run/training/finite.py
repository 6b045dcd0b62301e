"""Stops a run whose losses or weights are not finite, before such a checkpoint replaces a good one."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from galore_trainer.layouts.find import local
from galore_trainer.optim.guards import ROW_LIMIT, Later, some_of

if TYPE_CHECKING:
    from transformers import Trainer

LAST = 2
"""Training fails if its last so many steps had no finite loss; the optimizer skips a single bad batch."""


def not_finite(model: nn.Module) -> list[str]:
    """Names of the weights that hold an infinity or NaN in the part on this process; waits for the device."""
    weights = {name: local(p.detach()) for name, p in model.named_parameters()}
    weights = {name: weight for name, weight in weights.items() if weight.is_floating_point() and weight.numel()}
    if torch.isfinite(nn.utils.get_total_norm(weights.values())):  # the fastest pass; large numbers overflow in it
        return []
    return [name for name, weight in weights.items() if not torch.isfinite(weight).all()]


class FiniteCallback(TrainerCallback):
    """Checks every step's loss without waiting for the device, and the weights at certain times.

    Weights that are not finite end training at once. A loss that is not finite has gradients that are not, which
    ``GaLoreAdamW`` skips: ten such steps in a row end training, and no checkpoint of such a step is kept. Weights are
    checked after such a step, with every log, before a checkpoint is sealed, at the start and at the end.

    Raises:
        FloatingPointError: naming the step, and weights.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._row: Tensor | None = None  # steps in a row without a finite loss, on the device
        self._asked: deque[Later] = deque()
        self._steps = 0

    def watch(self, trainer: Trainer) -> None:
        """Record the loss of each forward pass of a Trainer."""
        step = trainer.training_step

        def noting(*args: Any, **kwargs: Any) -> Tensor:
            loss = step(*args, **kwargs)
            self._losses.append(loss.detach())
            return loss

        trainer.training_step = noting  # type: ignore[method-assign]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the weights of the checkpoint that training goes on from."""
        if state.global_step:
            self._check_weights(kwargs["model"], f"in the checkpoint of step {state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count steps without a finite loss, and act on the counts that have reached the host."""
        losses, self._losses = torch.stack(self._losses), []  # of its micro-batches
        bad = (~torch.isfinite(losses).all()).int()
        self._row = bad if self._row is None else (self._row + 1) * bad
        self._steps += 1
        self._asked.append(Later(self._row[None]))
        while self._asked and self._asked[0].ready:
            if row := int(self._asked.popleft().tolist()[0]):
                self._check_weights(kwargs["model"], f"after step {state.global_step}")
                if row >= ROW_LIMIT:
                    raise FloatingPointError(f"the loss was not finite in {row} steps in a row; {self._advice}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Look at the weights; the Trainer has waited for the device just now."""
        if logs and "loss" in logs:
            self._check_weights(kwargs["model"], f"after step {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the weights that were saved."""
        self._check_weights(kwargs["model"], f"after step {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fail where the final weights or the last losses are not finite."""
        self._check_weights(kwargs["model"], f"after step {state.global_step}")
        row = self.in_a_row()
        if row and (row >= LAST or row == self._steps):
            raise FloatingPointError(f"the loss was not finite in the last {row} steps; {self._advice}")

    def in_a_row(self) -> int:
        """How many steps up to now had no finite loss; waits for the device."""
        return 0 if self._row is None else int(self._row)

    def _check_weights(self, model: nn.Module, when: str) -> None:
        if bad := not_finite(model):
            raise FloatingPointError(f"weights were not finite {when}: {some_of(bad)}; {self._advice}")

    _advice = "lower learning_rate or weight_decay, or look for a bad batch"
