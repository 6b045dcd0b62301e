"""Looks every few steps for parameters whose steps are skipped, without making a device wait."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from galore_trainer.core.galore import largest_usable
from galore_trainer.layouts.dtensor import is_dtensor, local
from galore_trainer.optim.guards import ROW_LIMIT, Later, check_counts, counts_later, some_of, usable_flags

logger = logging.getLogger(__name__)
Leaves = Callable[[], Iterable[tuple[str, Tensor]]]
ASKED = (0, 7)  # steps of each ten; where ten in a row began with the first, its culprit can still be found
LATER = 5  # steps of each ten, and the tenth: an accelerator has answered by then, and all processes act together
ZEROS = 2  # answers in a row in which all gradients may be zero


class Watch:
    """Reads the counters of skipped steps, finds out whose gradients were bad, and stops a run that stands still.

    Args:
        skipped: steps that were skipped before, of all parameters together.
    """

    def __init__(self, skipped: int = 0) -> None:
        self.culprits = Culprits()
        self._skipped, self._zeros, self._asks_why_zero = skipped, 0, True
        self._named: set[str] = set()
        self._asked: tuple[list[str], Later, Any] | None = None
        self._counts: tuple[list[str], list[list[int]]] | None = None

    def look(
        self, step: int, counters: Callable[[], Mapping[str, Tensor]], leaves: Leaves,
        smallest: Callable[[], Tensor | None], skips: bool,
    ) -> None:  # fmt: skip
        """To be called in every step; all processes come to the same end in the same one.

        Args:
            step: how many there were.
            counters: of skipped steps, by parameter name.
            leaves: name and tensor of every weight, as autograd knows it.
            smallest: the gradient with the fewest entries; it is zero where clipping by an infinite norm made all so.
            skips: whether this step is known to have skipped a parameter.

        Raises:
            FloatingPointError: a parameter skipped ten steps in a row.
        """
        if self._asked is not None and (self._asked[1].ready or step % LATER == 0):
            self._read(leaves)
        if (skips or step % ROW_LIMIT in ASKED) and self._asked is None and (now := counters()):
            numbers = counts_later(now, is_all_zero(smallest()))
            self._asked = list(now), numbers, self.culprits.ask()
            if not numbers.waits:
                self._read(leaves)
        if step % LATER == 0 and self._counts is not None:
            check_counts(*self._counts, self.culprits.found)

    def _read(self, leaves: Leaves) -> None:
        """Take the answer in: name what is new, look at gradients where that can find a culprit."""
        assert self._asked is not None
        (names, numbers, asked), self._asked = self._asked, None
        *counts, (zero, _, _) = numbers.tolist()
        self._zeros = self._zeros + 1 if zero else 0
        skipped = sum(total for _, total, _ in counts)
        if skipped > self._skipped:
            new = [name for name, (_, total, _) in zip(names, counts, strict=True) if total and name not in self._named]
            self._tell(new)
        zeros = self._asks_why_zero and self._zeros >= ZEROS
        if skipped > self._skipped or zeros:
            if guilty := self.culprits.take_in(asked):
                limit = largest_usable(torch.float32)
                logger.warning(
                    "the gradient of %s was not finite or above %.0e: its step was skipped, or clipping by its norm "
                    "made all gradients NaN or zero", some_of(guilty), limit,
                )  # fmt: skip
                self.culprits.disarm()
                self._zeros = 0
            elif not self.culprits.armed:
                self.culprits.arm(leaves())
            elif not self._named:  # no step was skipped, and no gradient was bad: this one is zero for its own reasons
                self._asks_why_zero = False
                self.culprits.disarm()
        self._skipped, self._counts = skipped, (names, counts)
        if any(longest >= ROW_LIMIT for _, _, longest in counts):
            self.culprits.take_in(self.culprits.ask())

    def _tell(self, new: list[str]) -> None:
        if new:
            logger.warning(
                "skipped a step of %s: gradients that are not finite, or above %.0e; from now on gradients are looked "
                "at before clipping, to name the first", some_of(new), largest_usable(torch.float32),
            )  # fmt: skip
            self._named.update(new)


def is_all_zero(grad: Tensor | None) -> Tensor:
    """int32 [3]: whether a gradient is zero throughout, and two zeros; None counts as not zero."""
    numbers = torch.zeros(3, dtype=torch.int32, device="cpu" if grad is None else grad.device)
    if grad is not None and grad.numel():
        numbers[0] = ~grad.any()
    return numbers


class Culprits:
    """Looks at gradients as backward makes them, from ``arm`` to ``disarm``; otherwise it does nothing.

    ``Watch`` arms it after a skipped step, or where clipping may have made gradients zero. Each process looks at its
    own gradients.

    Attributes:
        found: names of weights whose own gradients were unusable, in the order in which that was seen.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self._hooks: list[Any] = []
        self._bad: dict[str, Tensor] = {}  # 1.0 where a gradient has been unusable since the hooks are there

    @property
    def armed(self) -> bool:
        """Whether gradients are looked at."""
        return bool(self._hooks)

    def arm(self, leaves: Iterable[tuple[str, Tensor]]) -> None:
        """Look at the gradients of these weights from the next backward on.

        Args:
            leaves: name and tensor of each weight, as autograd knows them.
        """
        own = weakref.ref(self)
        for name, p in leaves:
            if not p.requires_grad:
                continue

            def look(grad: Tensor, name: str = name) -> None:
                watching = own()
                if watching is not None:
                    watching._note(name, grad)

            if is_dtensor(p):  # FSDP2 computes with other tensors, and calls these hooks itself
                self._hooks.append(p.register_post_accumulate_grad_hook(lambda p, look=look: look(p.grad)))
            else:
                self._hooks.append(p.register_hook(look))

    def disarm(self) -> None:
        """Look at no gradient any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._bad = [], {}

    def ask(self) -> tuple[list[str], Later] | None:
        """What was seen since ``arm``: names, and on its way to the host whether each was bad; None for nothing."""
        if not self._bad:
            return None
        device = next(iter(self._bad.values())).device
        return list(self._bad), Later(torch.stack([bad.to(device) for bad in self._bad.values()]))

    def take_in(self, asked: tuple[list[str], Later] | None) -> list[str]:
        """Names of the weights that an answer of ``ask`` finds guilty; they are added to ``found``."""
        guilty = [name for name, bad in zip(asked[0], asked[1].tolist(), strict=True) if bad] if asked else []
        self.found += [name for name in guilty if name not in self.found]
        return guilty

    @torch.no_grad()
    def _note(self, name: str, grad: Tensor) -> None:
        bad = 1.0 - usable_flags([local(grad)])[0]
        before = self._bad.get(name)
        self._bad[name] = bad if before is None else torch.maximum(before, bad)
