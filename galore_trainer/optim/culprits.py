"""Which gradient was unusable first: clipping by a norm that is NaN makes all gradients NaN before a step sees them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from galore_trainer.layouts.dtensor import is_dtensor, local
from galore_trainer.optim.on_host import OnHost
from galore_trainer.optim.skips import usable_flags


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

    def ask(self) -> tuple[list[str], OnHost] | None:
        """What was seen since ``arm``: names, and on its way to the host whether each was bad; None for nothing."""
        if not self._bad:
            return None
        device = next(iter(self._bad.values())).device
        return list(self._bad), OnHost(torch.stack([bad.to(device) for bad in self._bad.values()]))

    def take_in(self, asked: tuple[list[str], OnHost] | None) -> list[str]:
        """Names of the weights that an answer of ``ask`` finds guilty; they are added to ``found``."""
        guilty = [name for name, bad in zip(asked[0], asked[1].tolist(), strict=True) if bad] if asked else []
        self.found += [name for name in guilty if name not in self.found]
        return guilty

    @torch.no_grad()
    def _note(self, name: str, grad: Tensor) -> None:
        bad = 1.0 - usable_flags([local(grad)])[0]
        before = self._bad.get(name)
        self._bad[name] = bad if before is None else torch.maximum(before, bad)
