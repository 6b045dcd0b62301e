"""From a parameter and its gradient to jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from galore_trainer.core.heads import LogicalMatrix
from galore_trainer.optim.layerwise import ProjectedGradient, is_finite, is_zero
from galore_trainer.optim.stack import Job


def jobs_of(
    p: Tensor, grad: Tensor, name: str, matrices: Sequence[LogicalMatrix], group: dict[str, Any], state: dict[str, Any]
) -> list[Job]:
    """What one step does to a projected parameter: one job for each of its logical matrices."""
    if state["calls"] == state["refreshes"] == 0 and group["lr"] == 0.0 and is_zero(grad):
        return []  # how checkpoint tools create state: nothing else may change
    parts: Sequence[Any] | None = None
    if isinstance(grad, ProjectedGradient):
        grad, parts = (grad, grad.parts) if grad.whole is None else (grad.whole, None)
    if len(matrices) == 1:
        return [Job(p, grad, name, matrices[0], state, group, parts[0] if parts else None)]
    parts = parts or [None] * len(matrices)
    ok, last = is_finite(grad), matrices[-1]
    pairs = zip(matrices, parts, strict=True)
    return [Job(p, grad, m.logical(name), m, state, group, part, m is last, ok) for m, part in pairs]
