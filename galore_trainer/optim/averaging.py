"""Processes with equal weights (DDP): are their bases equal, and, in layer-wise mode, the mean of their gradients.

In layer-wise mode what is kept of gradients is averaged once a step, when first asked for: by the norm that clipping
wants, or by the step. DDP is told to leave the projected weights alone, so that it holds no buckets for them. What the
hooks kept is linear in the gradient: its mean over processes is what one process would have kept of the mean gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.core.galore import compute_dtype
from galore_trainer.layouts.shard import Ranks, checksum
from galore_trainer.optim.layerwise import ProjectedGradient, measure_together
from galore_trainer.optim.stack import runs

BUCKET = 1 << 25  # entries that travel together
COMPARE_EVERY = 10  # refreshes of a weight


class Averager:
    """Averages the gradients that layer-wise mode keeps.

    Args:
        ranks: the processes.
        weights: name and tensor of every projected weight, on every process the same ones in the same order.

    Attributes:
        sent: bytes handed to all-reduce by this process so far, by kind: sketch, projected, sampled, along, whole.
    """

    def __init__(self, ranks: Ranks, weights: Callable[[], list[tuple[str, Tensor]]]) -> None:
        self.ranks, self._weights = ranks, weights
        self.sent: dict[str, int] = defaultdict(int)
        self._pending = False
        self._checked = False

    def note(self, grad: ProjectedGradient) -> None:
        """A backward has made or changed a gradient.

        Raises:
            RuntimeError: it had been averaged already.
        """
        if grad.averaged:
            raise RuntimeError(
                "backward ran after the gradients of a step had been averaged over processes (their norm was asked "
                "for, or they were clipped): call step() or zero_grad() first."
            )
        self._pending = True

    def settle(self) -> None:
        """Average what is pending; every process calls this at the same time.

        Raises:
            RuntimeError: processes began with different weights, or one has a gradient where another has none.
        """
        if not self._pending:
            return
        self._pending = False
        named = self._weights()
        if not self._checked:
            self._checked = True
            self._refuse(named, self.ranks.differing(torch.stack([checksum(p) for _, p in named])), "other weights")
        there = torch.tensor([p.grad is not None for _, p in named], dtype=torch.int64, device="cpu")
        self._refuse(named, self.ranks.hosts.differing(there), "no gradient where another has one")
        by_dtype: dict[torch.dtype, list[tuple[str, Tensor]]] = defaultdict(list)
        for grad in _projected(named):
            grad.averaged = True
            by_dtype[grad.dtype if grad.dtype == torch.bfloat16 else compute_dtype(grad.dtype)] += grad.kept()
        for wire, tensors in by_dtype.items():
            for bucket in runs(tensors, lambda pair: pair[1].numel(), BUCKET):
                self._reduce(bucket, wire)

    def measure(self) -> None:
        """Estimate the norms of all gradients, which were averaged, together."""
        measure_together(_projected(self._weights()))

    def _reduce(self, bucket: list[tuple[str, Tensor]], wire: torch.dtype) -> None:
        tensors = [x for _, x in bucket]
        flat = torch.empty(sum(x.numel() for x in tensors), dtype=wire, device=tensors[0].device)
        for kind, x in bucket:
            self.sent[kind] += x.numel() * flat.element_size()
        torch._foreach_copy_(_like(tensors, flat), tensors)
        torch._foreach_copy_(tensors, _like(tensors, self.ranks.sum(flat)))
        torch._foreach_div_(tensors, self.ranks.count)

    def _refuse(self, named: list[tuple[str, Tensor]], bad: Tensor, what: str) -> None:
        if bad.any():
            names = [name for (name, _), differs in zip(named, bad.tolist(), strict=True) if differs]
            raise RuntimeError(
                f"layer-wise mode under DDP: one process has {what}, in {names[0]} and {len(names) - 1} more. Load the "
                "same weights on every process, and let every weight take part in every forward, or train without "
                "galore.layerwise."
            )


def _projected(named: Sequence[tuple[str, Tensor]]) -> list[ProjectedGradient]:
    return [p.grad for _, p in named if isinstance(p.grad, ProjectedGradient)]


def _like(tensors: Sequence[Tensor], flat: Tensor) -> list[Tensor]:
    """Parts of a flat tensor, one after the other, in the shapes of some tensors."""
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def check_bases(ranks: Ranks, refreshed: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
    """Compare new bases between processes, at the first refresh of a weight and at every tenth.

    Args:
        ranks: the processes.
        refreshed: of each matrix with a new basis: its name, what its keys begin with, its weight's state.

    Raises:
        RuntimeError: on every process, if one has another basis; the first matrix is named.
    """
    compared = [each for each in refreshed if each[2]["refreshes"] % COMPARE_EVERY == 1]
    if not compared:
        return
    bad = ranks.differing(torch.stack([checksum(state[f"{prefix}basis"]) for _, prefix, state in compared]))
    if bad.any():
        names = [name for (name, _, _), differs in zip(compared, bad.tolist(), strict=True) if differs]
        raise RuntimeError(
            f"the processes have found different bases for {names[0]} (and {len(names) - 1} more matrices): their "
            "gradients, weights or random streams are no longer equal. Give every process the same seed and weights, "
            "and the same type of device."
        )
