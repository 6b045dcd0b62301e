"""A step over weights of which this process holds a part (FSDP2's DTensors, ZeRO's flat slices).

What crosses processes: rows that are cut in two and two numbers a weight in every step; at a refresh one head's rows
where heads share a basis, else n x k and k x k products (all rows for an exact SVD, own bases of heads, experts). The
arithmetic is that of whole weights (``core/``), but that kernels round factors to the dtype of ZeRO's models.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from galore_trainer.layouts.shard import completed_cut_rows
from galore_trainer.optim.averaging import check_bases
from galore_trainer.optim.held import Held, Opened
from galore_trainer.optim.parts import norms_of_tensors
from galore_trainer.optim.plain import PlainJob
from galore_trainer.optim.sharded_refresh import alike, refresh_held
from galore_trainer.optim.skips import Flag, usable_flags
from galore_trainer.optim.stack import Job, runs
from galore_trainer.optim.update import by_core, make_plain_state, move, move_plain, stack_elements

if TYPE_CHECKING:
    from galore_trainer.optim.galore_adamw import GaLoreAdamW


def step_sharded(optimizer: GaLoreAdamW, held: Sequence[Held]) -> list[Flag]:
    """One step of every weight; all processes pass the same weights in the same order.

    Returns:
        The weights' states with whether their gradients were usable on every process.
    """
    if not held:
        return []
    for members in _by_ranks(held):
        _count_up(members)
    resting = _create_states(optimizer, held)
    moving = [w for w in held if id(w) not in resting]
    projected = [w for w in moving if w.matrices]
    with optimizer.stopwatch.measure("plain", held[0].weight.device):
        plain = [w for w in moving if not w.matrices]
        for w in plain:
            if not w.state:
                make_plain_state(w.weight, w.state, optimizer.config)
        jobs = [PlainJob(w.weight, w.grad, w.name, w.group, w.ok, w.state) for w in plain]
        move_plain(jobs, optimizer.config, optimizer.seed)
    for members in _by_ranks(projected):
        rows = completed_cut_rows([w.shard for w in members], [w.grad for w in members])
        for w, cut in zip(members, rows, strict=True):
            w.cut_rows = cut
    due = [w for w in projected if w.due]
    if due:
        with optimizer.stopwatch.measure("refresh", due[0].weight.device):
            good = torch.stack([w.ok * (w.energy > 0.0) for w in due]).tolist()
            fit = [w for w, is_fit in zip(due, good, strict=True) if is_fit]
            for members in alike(fit, optimizer):
                refresh_held(optimizer, members)
            for members in _by_ranks(fit):
                new = [(m.logical(w.name), m.prefix, w.state) for w in members for m in w.matrices]
                check_bases(members[0].shard.ranks, new)
    if projected:
        with optimizer.stopwatch.measure("update", projected[0].weight.device):
            _update(optimizer, projected)
    return [(w.state, w.ok) for w in moving]


def _by_ranks(held: Sequence[Held]) -> Iterator[list[Held]]:
    groups: dict[Any, list[Held]] = {}
    for w in held:
        groups.setdefault(w.shard.ranks, []).append(w)
    return iter(groups.values())


def _count_up(held: list[Held]) -> None:
    """Sum over processes: whether moments can take a gradient in, and, where it is asked, its squared norm."""
    flats = [w.grad for w in held]
    numbers = [1.0 - torch.stack(usable_flags(flats)).double()]
    if any(w.fresh or w.due for w in held):  # the same on every process
        filled = [flat if flat.numel() else flat.new_zeros(1) for flat in flats]
        norms = torch.stack([norm.double() for norm in norms_of_tensors(filled)])
        numbers.append(norms * norms)
    bad, *energy = held[0].shard.ranks.sum(torch.stack(numbers)).unbind()
    for w, ok in zip(held, (bad == 0.0).float().unbind(), strict=True):
        w.ok = ok
    for w, each in zip(held, energy[0].unbind() if energy else (), strict=bool(energy)):
        w.energy = each


def _create_states(optimizer: GaLoreAdamW, held: Sequence[Held]) -> set[int]:
    """Make missing states; ids of weights that rest, as checkpoint tools only wanted their state to be made."""
    asked = [w for w in held if w.fresh and w.group["lr"] == 0.0]
    zero = (torch.stack([w.energy for w in asked]) == 0.0).tolist() if asked else []
    for w in held:
        if not w.state and w.matrices:
            w.make_state(optimizer.config, optimizer._phase(w.name, w.group))
    for w in asked:
        if not w.matrices and not w.state:
            make_plain_state(w.weight, w.state, optimizer.config)
    return {id(w) for w, rests in zip(asked, zero, strict=True) if rests}


def _update(optimizer: GaLoreAdamW, held: Sequence[Held]) -> None:
    """A step of every weight's pieces, each opened when its turn comes: the device works while the host goes on."""
    config, seed, asked = optimizer.config, optimizer.seed, optimizer.max_stack_elements
    most = stack_elements(held[0].weight.device, asked)
    for chunk in runs(held, lambda w: w.weight.numel() * w.is_copied, most):  # as many are copied at a time
        opened: dict[int, Opened] = {}
        numbered = [(w, i, piece) for w in chunk for i, piece in enumerate(itertools.chain(*w.pieces))]
        numbered.sort(key=lambda each: (each[2].length, each[2].columns), reverse=True)  # equal ones together

        def jobs(follow: bool, numbered: Any = numbered, opened: dict[int, Opened] = opened) -> Iterator[Job]:
            for w, i, piece in numbered:
                if piece.follows == follow:
                    yield (opened.get(id(w)) or opened.setdefault(id(w), Opened(w))).job(i)

        move(jobs(True), config, seed, asked)
        by_core(list(jobs(False)), config, seed, asked)  # kernels write where weights lie, not to copies
        for w in chunk:
            (opened.get(id(w)) or Opened(w)).close(config)
