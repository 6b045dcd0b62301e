"""A step between two refreshes: by ``core/`` on stacks, or by kernels where ``optim/fused.py`` can."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core import galore
from galore_trainer.core.sparse import part_of
from galore_trainer.optim import fused
from galore_trainer.optim.native import take_in
from galore_trainer.optim.plain import PlainJob, plain_state, plain_step
from galore_trainer.optim.residual_state import residual_lives, residual_step
from galore_trainer.optim.skips import Flag, no_skips
from galore_trainer.optim.stack import AGE, MOMENTS, Job, Stack, make_stacks
from galore_trainer.optim.streams import stream

STACK_ELEMENTS = 1 << 26  # gradient entries of equal matrices that are joined in one go on an accelerator
REFRESH_ELEMENTS = 1 << 28  # that get new bases in one go there, where whole gradients are not copied for it


def stack_elements(device: torch.device, asked: int | None = None, most: int = STACK_ELEMENTS) -> int:
    """Gradient entries that are treated at a time: many where launches cost, none on a CPU, where copies do."""
    if asked is not None:
        return asked
    return 0 if device.type == "cpu" else most


def move(jobs: Iterable[Job], config: GaLoreConfig, seed: int, asked: int | None = None) -> list[Flag]:
    """One step of matrices with the bases they have; whose gradients were finite, where it was not counted already.

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
    most = stack_elements(jobs[0].parameter.device, asked)
    return [flag for stack in make_stacks(jobs, most) for flag in update(stack, config, seed)]


def update(stack: Stack, config: GaLoreConfig, seed: int) -> list[Flag]:
    """One step of a stack by ``core/``."""
    side, group = stack.matrix.side, stack.group
    P, G = stack.get_basis(), stack.gradients()
    R = stack.kept("projected") if G is None else galore.project(G, P, side)
    by_job = galore.finite_parts(R, len(stack.jobs))  # [jobs]
    if stack.jobs[0].grad_ok is not None:
        by_job = by_job * torch.stack([job.grad_ok for job in stack.jobs if job.grad_ok is not None])
    ok = stack.spread(by_job)
    N = take_in(stack, MOMENTS, AGE, R, ok)
    sparse = None
    if residual_lives(stack.jobs[0], config):
        sparse = residual_step(stack, G, R, P, ok, config)
    parts = zip(stack.jobs, *(stack.split(x) for x in (N, P, ok)), strict=True)
    for i, (job, N_job, P_job, ok_job) in enumerate(parts):
        W = job.matrix.take(job.parameter)
        galore.apply_update_(
            W, N_job, P_job, side, lr=group["lr"], scale=config.scale, weight_decay=group["weight_decay"],
            ok=ok_job, sparse=part_of(sparse, i, job.matrix.blocks),
            generator=_rounding(job.parameter, job.name, job.state["calls"], config, seed),
        )  # fmt: skip
        job.matrix.put(job.parameter, W)
    return [(job.state, ok_job) for job, ok_job in zip(stack.jobs, by_job.unbind(), strict=True) if job.last]


def move_plain(jobs: Sequence[PlainJob], config: GaLoreConfig, seed: int) -> list[Flag]:
    """One step of AdamW on what is not projected; whose gradients were finite."""
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
