"""Looks every few steps for parameters whose steps are skipped, without making a device wait."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from galore_trainer.core.galore import largest_usable
from galore_trainer.optim.culprits import Culprits
from galore_trainer.optim.on_host import OnHost
from galore_trainer.optim.skips import ROW_LIMIT, check_counts, on_host, some_of

logger = logging.getLogger(__name__)
Leaves = Callable[[], Iterable[tuple[str, Tensor]]]
ASKED = (0, 7)  # steps of each ten: where ten in a row began with the first, its culprit can still be found
LATER = 5  # steps of each ten, and the tenth: an accelerator has answered by then


class Watch:
    """Reads the counters of skipped steps, finds out whose gradients were bad, and stops a run that stands still.

    Args:
        skipped: steps that were skipped before, of all parameters together.
    """

    def __init__(self, skipped: int = 0) -> None:
        self.culprits = Culprits()
        self._skipped = skipped
        self._asked: tuple[list[str], OnHost, Any] | None = None

    def look(self, step: int, counters: Callable[[], Mapping[str, Tensor]], leaves: Leaves) -> None:
        """To be called in every step; all processes come to the same answer in the same one.

        Args:
            step: how many there were.
            counters: of skipped steps, by parameter name.
            leaves: name and tensor of every weight, as autograd knows it.

        Raises:
            FloatingPointError: a parameter skipped ten steps in a row.
        """
        if step % LATER == 0:
            self._answer(leaves)
        if step % ROW_LIMIT in ASKED and (now := counters()):
            self._asked = list(now), on_host(now), self.culprits.ask()
            if not self._asked[1].waits:
                self._answer(leaves)

    def _answer(self, leaves: Leaves) -> None:
        asked, self._asked = self._asked, None
        if asked is not None:
            self._take_in(*asked, leaves)

    def _take_in(self, names: list[str], counters: OnHost, asked: Any, leaves: Leaves) -> None:
        counts = counters.tolist()
        skipped = sum(total for _, total, _ in counts)
        if skipped > self._skipped:
            guilty = self.culprits.take_in(asked)
            if guilty:
                limit = largest_usable(torch.float32)
                logger.warning(
                    "a step was skipped, since the gradient of %s was not finite or above %.0e", some_of(guilty), limit
                )
                self.culprits.disarm()
            elif not self.culprits.armed:
                self.culprits.arm(leaves())
        self._skipped = skipped
        if any(longest >= ROW_LIMIT for _, _, longest in counts):
            self.culprits.take_in(self.culprits.ask())
        check_counts(names, counts, self.culprits.found)
