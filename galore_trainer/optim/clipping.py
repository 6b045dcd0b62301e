"""Clipping inside the step: the norm of all gradients, and the factor that limits it, without a wait of the host.

    total = sqrt(sum of ||G||^2 over all weights)           c = min(1, max_grad_norm / (total + 1e-6))

as ``torch.nn.utils.clip_grad_norm_`` has them. Gradients stay as they are. c multiplies them where they enter the step:
R and D[S] where moments take them in, gradients of plain weights in their AdamW. The scaled residual phi D stays, since
phi = ||N|| / ||R|| gains what D loses. Bases do not depend on the size of a gradient.

The norm of a whole weight that keeps its basis comes with its projection, and R waits for c (``hold_projections``).
All other gradients are measured before they are projected: those of cut weights by ``exchange``, together with their
flags; those of plain weights and fused ones, those that are due and those that layer-wise mode kept by one more read.

Where total is NaN every weight skips the step. Where it is infinite c is 0: gradients become zero, as by torch, and
weights whose own gradients are not finite skip the step. In both cases refreshes that are due wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.galore import compute_dtype
from galore_trainer.optim.bucket import Bucket
from galore_trainer.optim.guards import usable_norms
from galore_trainer.optim.layerwise import is_usable, norms_of
from galore_trainer.optim.local import LocalWeight
from galore_trainer.optim.step import Joined, hold_projections

OFFSET = 1e-6  # of the divisor, as torch has it


def clip(
    plain: Sequence[LocalWeight],
    staying: Sequence[LocalWeight],
    due: Sequence[LocalWeight],
    config: GaLoreConfig,
    seed: int,
    asked: int | None,
) -> tuple[Tensor, list[Joined], list[LocalWeight]]:
    """Give every weight of a step its factor ``clip``, before the first one moves.

    Args:
        plain: weights that are not projected.
        staying, due: projected ones that keep their bases, and those that may get new ones.
        config, seed, asked: as for ``step.update``.

    Returns:
        The norm of all gradients before clipping, a float64 scalar tensor; what ``update`` takes as held; and the rest
        of ``staying``.
    """
    assert config.max_grad_norm is not None
    alone = [w for w in staying if _shows_norm(w)]
    held = hold_projections(alone, config, seed, asked)
    projected = {id(w) for w in alone}
    rest = [w for w in staying if id(w) not in projected]
    measured = [*plain, *rest, *due]
    buckets = [bucket for joined in held for bucket in joined.buckets]
    total = _norm(measured, buckets)
    factor = (config.max_grad_norm / (total + OFFSET)).clamp(max=1.0)
    _spread(factor, [*measured, *alone], buckets)
    return total, held, rest


def _shows_norm(w: LocalWeight) -> bool:
    """Whether the projection of a weight reads all of a gradient that nothing has measured yet."""
    return w.shard.is_whole and w.kept is None and [m.rows * m.columns for m in w.matrices] == [w.weight.numel()]


def _norm(measured: Sequence[LocalWeight], held: Sequence[Bucket]) -> Tensor:
    """The norm of all gradients; finds the energies, and flags, that are unknown."""
    device = (measured[0] if measured else held[0].pieces[0].owner).weight.device
    unknown = [w for w in measured if w.energy is None]
    norms = norms_of([w.grad for w in unknown])
    for w, norm, ok in zip(unknown, norms, usable_norms(norms), strict=True):
        w.energy = norm.double().square()
        w.ok = ok if w.kept is None else ok * is_usable(w.grad)
    energies = [w.energy.to(device).view(1) for w in measured if w.energy is not None]
    return torch.cat([*energies, *(bucket.energies().to(device) for bucket in held)]).sum().sqrt()


def _spread(factor: Tensor, weights: Sequence[LocalWeight], held: Sequence[Bucket]) -> None:
    """Hand the factor to all weights; where it is NaN none of their gradients is usable."""
    copies = {place: factor.to(*place) for place in dict.fromkeys(_place(w) for w in weights)}
    for w in weights:
        w.clip = copies[_place(w)]
    for device in dict.fromkeys(device for device, _ in copies):
        usable = (~factor.isnan()).float().to(device)
        known = [w for w in weights if w.ok is not None and w.weight.device == device]
        flags = [w.ok for w in known if w.ok is not None]
        for w, ok in zip(known, torch._foreach_mul(flags, usable) if flags else (), strict=True):
            w.ok = ok
        for bucket in held:
            if bucket.projected is not None and bucket.device == device:
                bucket.projected[1].mul_(usable)


def _place(w: LocalWeight) -> tuple[torch.device, torch.dtype]:
    """Where a weight takes the factor, and in which dtype."""
    return w.weight.device, compute_dtype(w.weight.dtype)
