"""A step between two refreshes: by ``core/`` on stacks, or by kernels where ``optim/fused.py`` can."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core import galore
from galore_trainer.core.sparse import Support, part_of
from galore_trainer.optim import fused, residual_state
from galore_trainer.optim.group_settings import scale_of
from galore_trainer.optim.native import Incoming, take_in
from galore_trainer.optim.plain import PlainJob, plain_state, plain_step
from galore_trainer.optim.skips import Flag, no_skips
from galore_trainer.optim.stack import AGE, MOMENTS, Job, Stack, entries, make_stacks, runs
from galore_trainer.optim.streams import stream

STACK_ELEMENTS = 1 << 26  # gradient entries of equal matrices that are joined in one go on an accelerator
REFRESH_ELEMENTS = 1 << 28  # that get new bases in one go there, where whole gradients are not copied for it


def stack_elements(device: torch.device, asked: int | None = None, most: int = STACK_ELEMENTS) -> int:
    """Gradient entries that are treated at a time: many where launches cost, none on a CPU, where copies do."""
    if asked is not None:
        return asked
    return 0 if device.type == "cpu" else most


def move(jobs: Iterable[Job], config: GaLoreConfig, seed: int, asked: int | None = None) -> list[Flag]:
    """One step of matrices with the bases they have; whose gradients were usable, where it was not counted already.

    Args:
        jobs: of one device.
        config, seed: of the optimizer.
        asked: gradient entries joined at a time, in place of what suits the device.
    """
    rest: list[Job] = []
    for stack in fused.divide(jobs, config, rest, asked):
        fused.update(stack, config, seed)
    return by_core(rest, config, seed, asked)


def by_core(jobs: Sequence[Job], config: GaLoreConfig, seed: int, asked: int | None = None) -> list[Flag]:
    """``move`` without kernels."""
    if not jobs:
        return []
    stacks = make_stacks(jobs, stack_elements(jobs[0].parameter.device, asked))
    together = runs(stacks, lambda stack: len(stack.jobs) * entries(stack.matrix), STACK_ELEMENTS)
    return [flag for some in together for flag in update(some, config, seed)]


class Begun(NamedTuple):
    """A stack in the middle of its step: basis, projections, flags, and what the projection lost, where it is kept."""

    stack: Stack
    P: Tensor
    R: Tensor
    by_job: Tensor
    ok: Tensor
    lost: tuple[Support, Tensor] | None


def update(stacks: Sequence[Stack], config: GaLoreConfig, seed: int) -> list[Flag]:
    """One step of stacks by ``core/``; moments of all of them take their gradients in together."""
    begun = [_begin(stack, config) for stack in stacks]
    updates = take_in([Incoming(x.stack, x.R, x.ok) for x in begun], MOMENTS, AGE)
    sparse = [Incoming(x.stack, x.lost[1], x.ok) for x in begun if x.lost is not None]
    sparse_updates = iter(take_in(sparse, residual_state.MOMENTS, residual_state.AGE))
    flags: list[Flag] = []
    for x, N in zip(begun, updates, strict=True):
        matrix, group, residual = x.stack.matrix, x.stack.group, None
        if x.lost is not None:
            N_S = next(sparse_updates)
            residual = x.lost[0], N_S if config.residual_scale == 1.0 else config.residual_scale * N_S
        parts = zip(x.stack.jobs, *(x.stack.split(each) for each in (N, x.P, x.ok)), strict=True)
        for i, (job, N_job, P_job, ok_job) in enumerate(parts):
            W = job.matrix.take(job.parameter)
            galore.apply_update_(
                W, N_job, P_job, matrix.side, lr=float(group["lr"]), scale=scale_of(group, config),
                weight_decay=group["weight_decay"],
                ok=ok_job, sparse=part_of(residual, i, job.matrix.blocks),
                generator=_rounding(job.parameter, job.name, job.state["calls"], config, seed),
            )  # fmt: skip
            job.matrix.put(job.parameter, W)
        each = zip(x.stack.jobs, x.by_job.unbind(), strict=True)
        flags += [(job.state, flag) for job, flag in each if job.last]
    return flags


def _begin(stack: Stack, config: GaLoreConfig) -> Begun:
    """What needs the gradients, which are not looked at again."""
    P, G, side = stack.get_basis(), stack.gradients(), stack.matrix.side
    if G is None:
        R = stack.kept("projected")
    elif side == "left" and G.device.type == "cpu":
        R = galore.project(G.mT, P, "right").mT  # the same, a quarter faster there
    else:
        R = galore.project(G, P, side)
    by_job = galore.usable_parts(R, len(stack.jobs))  # [jobs]
    if stack.jobs[0].grad_ok is not None:
        by_job = by_job * torch.stack([job.grad_ok for job in stack.jobs if job.grad_ok is not None])
    lost = None
    if residual_state.residual_lives(stack.jobs[0], config):
        lost = residual_state.lost_part(stack, G, R, P, stack.spread(by_job), config)
    if lost is not None:  # what the basis does not see can be too large all the same
        by_job = by_job * galore.usable_parts(lost[1], len(stack.jobs))
    return Begun(stack, P, R, by_job, stack.spread(by_job), lost)


def move_plain(jobs: Sequence[PlainJob], config: GaLoreConfig, seed: int) -> list[Flag]:
    """One step of AdamW on what is not projected; whose gradients were usable."""
    flags, rest = fused.plain_update(jobs, config, seed)
    return flags + [update_plain(job, config, seed) for job in rest]


def update_plain(job: PlainJob, config: GaLoreConfig, seed: int) -> Flag:
    """One step of AdamW on one parameter, or on this process's part of it."""
    p, grad, name, group, ok, state = job
    if not state:
        make_plain_state(p, state, config)
    calls, noise = state["calls"], None
    if config.plain_state_bits < 32:
        noise = stream(p.device, seed, name, "moments", calls)
    plain_step(p, grad, state, group, ok, _rounding(p, name, calls, config, seed), noise)
    state["calls"] += 1
    return state, ok


def make_plain_state(p: Tensor, state: MutableMapping[str, Any], config: GaLoreConfig) -> None:
    """The state of a parameter that is not projected, before its first step."""
    state.update(plain_state(p, config.plain_state_bits), calls=0, skipped=no_skips(p.device))


def _rounding(p: Tensor, name: str, calls: int, config: GaLoreConfig, seed: int) -> torch.Generator | None:
    return stream(p.device, seed, name, "rounding", calls) if fused.rounds(p, config) else None
