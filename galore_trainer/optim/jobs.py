"""From parameters with gradients to jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_trainer.core.galore import compute_dtype
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.errors import OptionError
from galore_trainer.layouts.dtensor import is_dtensor
from galore_trainer.optim.layerwise import ProjectedGradient, is_usable, is_zero
from galore_trainer.optim.locate import PLAIN_TYPES, Locator
from galore_trainer.optim.stack import Job


class Plain(NamedTuple):
    """A parameter with a gradient that plain AdamW moves."""

    p: Tensor
    grad: Tensor
    name: str
    group: dict[str, Any]


class Projected(NamedTuple):
    """A weight with a gradient that is projected, and whole."""

    p: Tensor
    grad: Tensor
    name: str
    matrices: list[LogicalMatrix]
    group: dict[str, Any]


def with_gradients(
    groups: Sequence[dict[str, Any]], locator: Locator
) -> tuple[list[Plain], list[Projected], bool]:  # fmt: skip
    """What has a gradient, in one pass; and whether there is more: weights of which this process holds a part.

    Projected weights of one shape come one after the other, large ones first: a device has most to do when it begins.

    Raises:
        OptionError: a gradient is sparse, or a parameter is no longer what its state was made for.
    """
    plain: list[Plain] = []
    whole: list[Projected] = []
    held = False
    locator.check_groups(groups)
    for group in groups:
        params, names, flat, noted = group["params"], group["names"], locator.is_flat(group), locator.noted(group)
        shapes, addresses = noted.shapes, noted.addresses
        projected = group["projected"] and not flat
        for i in noted.by_size if projected else range(len(params)):
            p = params[i]
            if (grad := p.grad) is None:
                continue
            if grad.layout is not torch.strided:
                raise OptionError(names[i], "a sparse gradient", "a dense one", "Use sparse=False.")
            if grad.is_neg() or (grad.dtype != p.dtype and compute_dtype(grad.dtype) != compute_dtype(p.dtype)):
                grad = grad.resolve_neg().to(compute_dtype(p.dtype))
            moved = type(p) in PLAIN_TYPES and p.data_ptr() != addresses[i]
            if not flat and (moved or p.shape != shapes[i]):
                locator.check(group, i)
            if flat or is_dtensor(p):
                held = True
            elif projected:
                whole.append(Projected(p, grad, names[i], group["matrices"][i], group))
            else:
                plain.append(Plain(p, grad, names[i], group))
    return plain, whole, held


def smallest_of(plain: Sequence[Plain], whole: Sequence[Projected]) -> Tensor | None:
    """The gradient with the fewest entries, if any is kept whole."""
    grads = [*(each.grad for each in plain), *(each.grad for each in whole)]
    return min((grad for grad in grads if type(grad) is Tensor and grad.numel()), key=Tensor.numel, default=None)


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
    ok, last = is_usable(grad), matrices[-1]
    pairs = zip(matrices, parts, strict=True)
    return [Job(p, grad, m.logical(name), m, state, group, part, m is last, ok) for m, part in pairs]
