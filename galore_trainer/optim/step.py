"""One step of projected weights between two refreshes, on one page: project, take into moments, lift, apply.

Letters as in ``core/galore.py``. Torch and Triton are two objects with the same six verbs (``ops_torch.py``,
``ops_triton.py``): ``project``, ``lost``, ``adam_``, ``line_factors``, ``limit_`` and ``apply_``. ``GaLoreAdamW.move``
calls ``update`` once for weights that keep their bases, once for weights with new bases, and ``count`` at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.kernels import obstacle
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
from galore_trainer.optim.ops_triton import TritonOps, buckets_for_triton, wanted


class Taken(NamedTuple):
    """What the gradients of a bucket have become: all that is needed to move its weights.

    Attributes:
        bucket: equal pieces.
        ok: [pieces], 1.0 where the gradient is usable.
        N: normalised updates.
        scaled: the scaled residual, if there is one.
        D, N_S: what was lost at the sparse residual's support, and its update, if there is one.
    """

    bucket: Bucket
    ok: Tensor
    N: Tensor
    scaled: residual.Scaled | None
    D: Tensor | None
    N_S: Tensor | None


def step_buckets(buckets: Sequence[Bucket], ops: TorchOps | TritonOps, config: GaLoreConfig) -> list[Taken]:
    """First half of a step: gradients enter the moments, in the bases that there are.

    Args:
        buckets: one, or several where torch computes: on a CPU one call takes all gradients into the moments.
        ops: compute.
        config: of the optimizer.
    """
    projected: list[Incoming] = []
    lost: list[Tensor | None] = []
    for bucket in buckets:
        # R = project(G). Where ok is 0.0 nothing below changes the weight, its moments or their age.
        R, ok = bucket.take_projected() or ops.project(bucket)
        # D = G - lift(R) by ``ops.lost``, while a CPU's cache holds G; puts ok to 0.0 where D is not usable.
        lost.append(residual.lost_entries(bucket, ops, R, ok, config))
        projected.append(Incoming(bucket, R, ok))
    # M <- b1 M + (1 - b1) R, V <- b2 V + (1 - b2) R R, N = (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)
    updates = ops.adam_(projected, MOMENTS, AGE)
    sparse = residual.take_in(projected, updates, lost, ops, config)
    return [
        # phi_j = residual_scale ||N_j|| / ||R_j|| for each line
        Taken(bucket, ok, N, residual.scale_lost(bucket, ops, R, N, ok, config), D, N_S)
        for (bucket, R, ok), N, D, N_S in zip(projected, updates, lost, sparse, strict=True)
    ]


def apply(taken: Taken, ops: TorchOps | TritonOps) -> None:
    """Second half of a step: W <- W - lr wd W - lr scale (lift(N) + phi D + residual_scale N_S at S)."""
    bucket, ok, N, scaled, D, N_S = taken
    if scaled is not None and D is not None and N_S is not None:
        N_S = residual.in_place_of_scaled(bucket, scaled, N_S, D, ok)
    dense = None if scaled is None else (scaled.R, scaled.phi)
    ops.apply_(bucket, N, ok, dense, None if N_S is None else (residual.INDEX, N_S))


class Joined(NamedTuple):
    """Weights that are open, and the equal pieces of them that are moved together.

    Attributes:
        weights: they are closed when the next ones are opened.
        ops: compute.
        buckets: one, or several where torch computes.
    """

    weights: list[LocalWeight]
    ops: TorchOps | TritonOps
    buckets: Sequence[Bucket]


def update(
    weights: Sequence[LocalWeight],
    config: GaLoreConfig,
    seed: int,
    asked: int | None = None,
    held: list[Joined] | None = None,
) -> list[Moved]:
    """One step of projected weights with the bases they have.

    Args:
        weights: equal ones one after the other.
        config, seed: of the optimizer.
        asked: gradient entries joined at a time, in place of what suits the device.
        held: other weights, from ``hold_projections``; they are taken out of this list as they move.
    """
    moved: list[Moved] = []
    while held:
        moved += _moved(whole_step(held.pop(0), config))
    for ranks, alike in residual.by_limit(weights, config).items():
        opened = _joined(alike, config, seed, asked)
        if ranks is None:
            for joined in opened:
                moved += _moved(whole_step(joined, config))
            continue
        waiting: list[tuple[Joined, Taken]] = []  # how far the scaled residual may go depends on the other processes
        for joined in opened:
            with _device_of(joined):
                waiting += ((joined, some) for some in step_buckets(joined.buckets, joined.ops, config))
            for bucket in joined.buckets:
                bucket.let_go()
        residual.limit_growth_across([(some.bucket, some.scaled) for _, some in waiting], config, ranks, alike)
        _second_halves(waiting)
    return moved + moved_together(w for w in weights if w.ok is not None)


def hold_projections(
    weights: Sequence[LocalWeight], config: GaLoreConfig, seed: int, asked: int | None = None
) -> list[Joined]:
    """Project whole weights with the bases they have, and hold R until ``update`` takes it in.

    Where gradients are clipped no weight moves before their norm is known, which comes with the projection
    (``Bucket.energies``). R of all these weights is held: 4 bytes an entry, 8 of a float64 weight.

    Args:
        weights, config, seed, asked: as for ``update``.
    """
    held: list[Joined] = []
    for joined in _joined(weights, config, seed, asked) if weights else ():
        with _device_of(joined):
            for bucket in joined.buckets:
                bucket.projected = joined.ops.project(bucket)
                bucket.drop_copies()
        held.append(joined)
    return held


def _joined(weights: Sequence[LocalWeight], config: GaLoreConfig, seed: int, asked: int | None) -> Iterator[Joined]:
    """Open weights, some at a time, and join equal pieces."""
    most = bucket_elements(weights[0].weight.device, asked)
    for chunk in runs(weights, lambda w: w.copied, most):  # so many entries are copied at a time
        if config.sparse_percent > 0.0:
            for w in chunk:
                w.age_keys = residual.start_ages(w, config)
        pieces = (piece for w in chunk for piece in w.open())  # as they are needed: the device works meanwhile
        rest: list[Piece] = []
        triton, by_torch = TritonOps(config, seed), TorchOps(config, seed)
        for bucket in buckets_for_triton(pieces, config, rest, asked):
            yield Joined(chunk, triton, [bucket])
        for buckets in runs(make_buckets(rest, most), lambda b: len(b.pieces) * entries(b.matrix), STACK_ELEMENTS):
            yield Joined(chunk, by_torch, buckets)
        for w in chunk:
            w.close()


def whole_step(joined: Joined, config: GaLoreConfig) -> list[Taken]:
    """Both halves of a step."""
    with _device_of(joined):
        taken = step_buckets(joined.buckets, joined.ops, config)
        residual.limit_growth([(some.bucket, some.scaled) for some in taken], joined.ops)
        for some in taken:
            apply(some, joined.ops)
    return taken


def _second_halves(waiting: Iterable[tuple[Joined, Taken]]) -> None:
    """Open weights again, and do the second half of their step."""
    for _, group in itertools.groupby(waiting, key=lambda half: id(half[0].weights)):
        halves = list(group)
        chunk = halves[0][0].weights
        opened = {(id(w), piece.prefix): piece for w in chunk for piece in w.open()}
        for joined, taken in halves:
            taken.bucket.pieces = [opened[id(piece.owner), piece.prefix] for piece in taken.bucket.pieces]
            with _device_of(joined):
                apply(taken, joined.ops)
        for w in chunk:
            w.close()


def _device_of(joined: Joined) -> torch.cuda.device_of:
    """Makes the device current on which kernels have to be launched."""
    return torch.cuda.device_of(joined.buckets[0].pieces[0].weight)


def _moved(taken: Iterable[Taken]) -> Iterator[Moved]:
    """Weights whose flag their projection decided; the others got theirs in ``exchange``."""
    for some in taken:
        weights = [piece.owner for piece in some.bucket.pieces]
        if weights[0].ok is None:
            yield Moved(weights, some.ok, weights[0].age_keys)


def count(moved: Sequence[Moved], config: GaLoreConfig) -> None:
    """Count the step once a weight: ages of moments, skipped gradients, calls."""
    by_form: dict[tuple[torch.device, Sequence[str]], list[Moved]] = {}
    for some in moved:
        by_form.setdefault((some.ok.device, some.age_keys), []).append(some)
    for (_, ages), members in by_form.items():
        states = [w.state for some in members for w in some.weights]
        oks = [some.ok for some in members]
        ok = oks[0] if len(oks) == 1 else torch.cat(oks)
        if not _count_on_gpu(states, ok, ages, config):
            for key in ages:
                torch._foreach_add_([state[key] for state in states], list(ok.unbind()))
            count_skips(states, ok)
        for state in states:
            state["calls"] += 1


def _count_on_gpu(
    states: Sequence[MutableMapping[str, Any]], ok: Tensor, ages: Sequence[str], config: GaLoreConfig
) -> bool:
    """Count ages and skipped gradients of weights by a kernel; False where none can.

    Args:
        states: of the weights, all on one device.
        ok: [weights], 1.0 or 0.0.
        ages: keys of the ages that grow.
        config: of the optimizer.
    """
    device = ok.device
    if not wanted(config, device) or obstacle(device, torch.float32) is not None:
        return False
    from galore_trainer.kernels.adam import count_
    from galore_trainer.kernels.tables import scatter

    keys = ("skipped", *ages)
    columns = {key: [state[key].data_ptr() for state in states] for key in keys}
    dtypes = {key: states[0][key].dtype for key in keys}
    with torch.cuda.device_of(ok):
        tables = scatter(columns, dtypes, device)
        count_([tables[key] for key in ages], tables["skipped"], ok)
    return True
