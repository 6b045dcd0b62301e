"""One step of projected weights between two refreshes, on one page: project, take into moments, lift, apply.

Letters as in ``core/galore.py``. Torch and Triton are two objects with the same four verbs (``ops_torch.py``,
``ops_triton.py``): ``project``, ``lost``, ``adam_`` and ``apply_``. ``GaLoreAdamW.move`` calls ``update`` once for
weights that keep their bases, once for weights with new bases, and ``count`` at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.optim import residual
from galore_trainer.optim.bucket import (
    MOMENTS,
    STACK_ELEMENTS,
    Bucket,
    bucket_elements,
    entries,
    make_buckets,
    runs,
)
from galore_trainer.optim.guards import count_skips
from galore_trainer.optim.local import AGE, LocalWeight, Moved, Piece, moved_together
from galore_trainer.optim.ops_torch import Incoming, TorchOps
from galore_trainer.optim.ops_triton import TritonOps, buckets_for_triton, count_on_gpu


def step_buckets(buckets: Sequence[Bucket], ops: TorchOps | TritonOps, config: GaLoreConfig) -> list[Tensor]:
    """One step of some buckets, with the bases that they have.

    Args:
        buckets: one, or several where torch computes: on a CPU one call takes all gradients into the moments.
        ops: moves them.
        config: of the optimizer.

    Returns:
        For each bucket whether its gradients were usable, [pieces].
    """
    projected: list[Incoming] = []
    lost: list[Tensor | None] = []
    for bucket in buckets:
        # R = project(G). Where ok is 0.0 nothing below changes the weight, its moments or their age.
        R, ok = ops.project(bucket)
        # D = G - lift(R) by ``ops.lost``, while a CPU's cache holds G; puts ok to 0.0 where D is not usable.
        lost.append(residual.lost_entries(bucket, ops, R, ok, config))
        projected.append(Incoming(bucket, R, ok))
    sparse = residual.take_in(projected, lost, ops)
    # M <- b1 M + (1 - b1) R, V <- b2 V + (1 - b2) R R, N = (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)
    updates = ops.adam_(projected, MOMENTS, AGE)
    # W <- W - lr wd W - lr scale (lift(N) + residual_scale N_S at S)
    for (bucket, _, ok), N, at_support in zip(projected, updates, sparse, strict=True):
        ops.apply_(bucket, N, ok, at_support)
    return [ok for _, _, ok in projected]


def update(weights: Sequence[LocalWeight], config: GaLoreConfig, seed: int, asked: int | None = None) -> list[Moved]:
    """One step of projected weights with the bases they have.

    Args:
        weights: equal ones one after the other.
        config, seed: of the optimizer.
        asked: gradient entries joined at a time, in place of what suits the device.
    """
    if not weights:
        return []
    moved: list[Moved] = []
    most = bucket_elements(weights[0].weight.device, asked)
    for chunk in runs(weights, lambda w: w.copied, most):  # so many entries are copied at a time
        if config.residual_percent > 0.0:
            for w in chunk:
                w.age_keys = residual.start_ages(w, config)
        pieces = (piece for w in chunk for piece in w.open())  # as they are needed: the device works meanwhile
        rest: list[Piece] = []
        triton = TritonOps(config, seed)
        for bucket in buckets_for_triton(pieces, config, rest, asked):
            with torch.cuda.device_of(bucket.pieces[0].weight):  # kernels are launched on the current device
                moved += _moved([bucket], step_buckets([bucket], triton, config))
        together = runs(make_buckets(rest, most), lambda b: len(b.pieces) * entries(b.matrix), STACK_ELEMENTS)
        for buckets in together:
            moved += _moved(buckets, step_buckets(buckets, TorchOps(config, seed), config))
        for w in chunk:
            w.close()
    return moved + moved_together(w for w in weights if w.ok is not None)


def _moved(buckets: Iterable[Bucket], flags: Iterable[Tensor]) -> Iterator[Moved]:
    """Weights whose flag their projection decided; the others got theirs in ``exchange``."""
    for bucket, ok in zip(buckets, flags, strict=True):
        weights = [piece.owner for piece in bucket.pieces]
        if weights[0].ok is None:
            yield Moved(weights, ok, weights[0].age_keys)


def count(moved: Sequence[Moved], config: GaLoreConfig) -> None:
    """Count the step once a weight: ages of moments, skipped gradients, calls."""
    by_form: dict[tuple[torch.device, Sequence[str]], list[Moved]] = {}
    for some in moved:
        by_form.setdefault((some.ok.device, some.age_keys), []).append(some)
    for (_, ages), members in by_form.items():
        states = [w.state for some in members for w in some.weights]
        oks = [some.ok for some in members]
        ok = oks[0] if len(oks) == 1 else torch.cat(oks)
        if not count_on_gpu(states, ok, ages, config):
            for key in ages:
                torch._foreach_add_([state[key] for state in states], list(ok.unbind()))
            count_skips(states, ok)
        for state in states:
            state["calls"] += 1
