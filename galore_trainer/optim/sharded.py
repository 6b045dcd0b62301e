"""A step over weights of which this process holds a part (FSDP2's DTensors, ZeRO's flat slices).

What crosses processes: rows that are cut in two and two numbers a weight in every step; at a refresh one head's rows
where heads share a basis, else n x k and k x k products (all rows for an exact SVD, own bases of heads, experts). The
arithmetic is that of whole weights (``core/``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core import galore
from galore_trainer.core.basis import sketch_width
from galore_trainer.core.heads import LogicalMatrix
from galore_trainer.layouts.shard import Shard, completed_cut_rows
from galore_trainer.optim.averaging import check_bases
from galore_trainer.optim.pieces import Piece, PieceState, commit, stored_rows
from galore_trainer.optim.plain import PlainJob
from galore_trainer.optim.refresh import count_refresh, draw_heads, find_bases
from galore_trainer.optim.residual_state import AGE as RESIDUAL_AGE
from galore_trainer.optim.residual_state import has_residual, reset_residual
from galore_trainer.optim.skips import Flag, finite_flags, no_skips
from galore_trainer.optim.stack import AGE, Job, Stack, runs
from galore_trainer.optim.update import (
    REFRESH_ELEMENTS,
    STACK_ELEMENTS,
    by_core,
    make_plain_state,
    move,
    move_plain,
    stack_elements,
)

if TYPE_CHECKING:
    from galore_trainer.optim.galore_adamw import GaLoreAdamW

MOMENT_DTYPES = {32: torch.float32, 16: torch.bfloat16}


class Held:
    """A weight of which this process holds a part, in one step.

    Args:
        name: logical name.
        group: the optimizer's group.
        state: of this weight.
        shard: where the part lies.
        weight, grad: its entries, [stop - start]; the weight's is changed in place.
        matrices: its logical matrices; none where it is plain.
        pieces: of each matrix, the local part.
        factors: see ``Job``.
    """

    def __init__(
        self, name: str, group: dict[str, Any], state: MutableMapping[str, Any], shard: Shard, weight: Tensor,
        grad: Tensor, matrices: Sequence[LogicalMatrix] = (), pieces: Sequence[Sequence[Piece]] = (),
        factors: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.name, self.group, self.state, self.shard = name, group, state, shard
        self.weight, self.grad, self.matrices, self.pieces = weight, grad, matrices, pieces
        self.factors = factors
        self.cut_rows: dict[int, Tensor] = {}
        self.ok = self.energy = torch.zeros(())

    @property
    def fresh(self) -> bool:
        """Whether no gradient has been taken in yet."""
        return not self.state or self.state["calls"] == self.state.get("refreshes", 0) == 0

    @property
    def due(self) -> bool:
        """Whether new bases are due."""
        return bool(self.matrices) and self.state["calls"] >= self.state["due"]

    def make_state(self, config: GaLoreConfig, phase: int) -> None:
        """The state of a projected weight that has seen nothing."""
        state, rows, device = self.state, self.shard.local_rows, self.weight.device
        state.update(calls=0, refreshes=0, due=0, born=0, phase=phase, skipped=no_skips(device))
        for matrix in self.matrices:
            whole = self.stack(matrix, state)
            whole.put_basis(torch.zeros(matrix.basis_shape, device=device))
            whole.put_count(AGE, torch.zeros(matrix.blocks, 1, 1, device=device))
        shape, dtype = (rows, self.matrices[0].rank), MOMENT_DTYPES[config.state_bits]
        state.update({key: torch.zeros(shape, dtype=dtype, device=device) for key in ("exp_avg", "exp_avg_sq")})

    def gradient(self) -> Tensor:
        """Local rows, complete: [local rows, N]."""
        rows = self.shard.rows_of(self.grad)
        for row, entries in self.cut_rows.items():
            rows[row] = entries
        return rows

    def stack(self, matrix: LogicalMatrix, state: MutableMapping[str, Any], W: Any = None, G: Any = None) -> Stack:
        """A stack of one job."""
        W = self.weight if W is None else W
        name = matrix.name if isinstance(matrix, Piece) else matrix.logical(self.name)
        G = W if G is None else G
        job = Job(W, G, name, matrix, state, self.group, None, False, self.ok, self.factors)  # type: ignore[arg-type]
        return Stack([job])


def step_sharded(optimizer: GaLoreAdamW, held: Sequence[Held]) -> list[Flag]:
    """One step of every weight; all processes pass the same weights in the same order.

    Returns:
        The weights' states with whether their gradients were finite on every process.
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
            for members in _alike(fit, optimizer):
                _refresh(optimizer, members)
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
    """Sum over processes: whether every number of a gradient is finite, and, where it is asked, its squared norm."""
    flats = [w.grad for w in held]
    numbers = [1.0 - torch.stack(finite_flags(flats)).double()]
    if any(w.fresh or w.due for w in held):  # the same on every process
        filled = [flat if flat.numel() else flat.new_zeros(1) for flat in flats]
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(filled, 2, torch.float32)])
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
            w.make_state(optimizer.config, optimizer._phase(w.name))
    for w in asked:
        if not w.matrices and not w.state:
            make_plain_state(w.weight, w.state, optimizer.config)
    return {id(w) for w, rests in zip(asked, zero, strict=True) if rests}


# ---------------------------------------------------------------------- update


def _update(optimizer: GaLoreAdamW, held: Sequence[Held]) -> None:
    config, seed, asked = optimizer.config, optimizer.seed, optimizer.max_stack_elements
    most = stack_elements(held[0].weight.device, asked)
    for chunk in runs(held, lambda w: w.weight.numel() * w.shard.is_ragged, most):  # as many are copied at a time
        opened = [(w, w.shard.rows_of(w.weight), w.gradient()) for w in chunk]
        jobs: list[Job] = []
        states = []
        for w, W, G in opened:
            own = _piece_states(w.state, w.pieces)
            states.append(own)
            jobs += [w.stack(state.piece, state, W[state.piece.at], G[state.piece.at]).jobs[0] for state in own]
        views = [isinstance(state.piece.at, slice) for own in states for state in own]  # kernels write to these
        alike = sorted(zip(jobs, views, strict=True), key=lambda pair: pair[0].parameter.shape, reverse=True)
        move([job for job, view in alike if view], config, seed, asked)
        by_core([job for job, view in alike if not view], config, seed, asked)
        moved = iter(jobs)
        for (w, W, _), own in zip(opened, states, strict=True):
            for state in own:
                job = next(moved)
                if not isinstance(state.piece.at, slice):  # its rows are a copy
                    W[state.piece.at] = job.parameter
            commit(w.state, own, w.shard.local_rows)
            for matrix, pieces in zip(w.matrices, w.pieces, strict=True):
                if not pieces:
                    _count_along(w, matrix, optimizer.config)
            w.shard.write(w.weight, W)
            w.state["calls"] += 1


def _piece_states(state: MutableMapping[str, Any], pieces: Sequence[Sequence[Piece]]) -> list[PieceState]:
    return [PieceState(state, piece, shares=len(own) > 1) for own in pieces for piece in own]


def _count_along(w: Held, matrix: LogicalMatrix, config: GaLoreConfig) -> None:
    """Without a row of a matrix its counters go on, so that they are the same on every process."""
    state, prefix = w.state, matrix.prefix
    state[prefix + AGE] = state[prefix + AGE] + w.ok
    if not has_residual(matrix, config) or state["refreshes"] == 0:
        return
    key, chosen = prefix + RESIDUAL_AGE, state["calls"] - state["born"] + 1 >= config.residual_warmup_steps
    if key in state:
        state[key] = state[key] + w.ok
    elif chosen:
        state[key] = w.ok if config.residual_warmup_steps == 0 else torch.zeros_like(w.ok)


# ---------------------------------------------------------------------- refresh


def _alike(held: Sequence[Held], optimizer: GaLoreAdamW) -> Iterator[list[Held]]:
    """Equal weights whose bases are found together, the same on every process; not too many at a time."""
    config, asked = optimizer.config, optimizer.max_stack_elements

    def elements(w: Held) -> int:
        """Of rows that stay where they are this process's share; gathered ones are all here, in float32, and copied."""
        per_copy = REFRESH_ELEMENTS // STACK_ELEMENTS
        sizes = (
            m.rows * m.columns // w.shard.ranks.count if _stays(m, config) else per_copy * math.prod(m.lending_shape)
            for m in w.matrices
        )
        return sum(sizes)

    groups: dict[Any, list[Held]] = {}
    for w in held:
        key = (w.shard.ranks, w.shard.rows, w.shard.columns, tuple(w.matrices), w.state["refreshes"] == 0)
        groups.setdefault(key, []).append(w)
    for members in groups.values():
        yield from runs(members, elements, stack_elements(members[0].weight.device, asked, REFRESH_ELEMENTS))


def _stays(matrix: LogicalMatrix, config: GaLoreConfig) -> bool:
    """Whether a basis is found from rows where they lie: not where few rows lend it, or all are needed in one place."""
    _, rows, columns = matrix.lending_shape
    smaller = min(rows, columns)
    thin = sketch_width(matrix.rank, config.resolved_oversampling(matrix.rank), smaller, smaller) < smaller
    return config.svd == "randomized" and matrix.blocks == 1 and thin and not matrix.lends_heads


def _refresh(optimizer: GaLoreAdamW, held: Sequence[Held]) -> None:
    """New bases for equal weights, the same on every process, and their local moments carried over."""
    config, first = optimizer.config, held[0].state["refreshes"] == 0
    grads = [w.gradient().to(w.factors or w.grad.dtype) for w in held]
    names: list[str] = []
    energies: list[Tensor] = []
    for j in range(len(held[0].matrices)):
        stack = Stack([w.stack(w.matrices[j], w.state).jobs[0] for w in held])
        each = stack.split(_bases(held, stack, grads, config, optimizer.seed))
        if not first:
            triples = zip(held, stack.jobs, each, strict=True)
            each = [_carry_over(w, Stack([job]), w.pieces[j], P, config) for w, job, P in triples]
        bases = stack.split(stack.put_basis(torch.cat(list(each))))
        names += [job.name for job in stack.jobs]
        energies += [_energies(w, w.pieces[j], G, P) for w, G, P in zip(held, grads, bases, strict=True)]
    whole, kept = held[0].shard.ranks.sum(torch.stack(energies)).unbind(dim=1)
    errors = (1.0 - kept / whole.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0.0).sqrt()
    optimizer.projection_errors.update(zip(names, errors.unbind(), strict=True))
    for w in held:
        count_refresh(w.state, config)


def _bases(held: Sequence[Held], stack: Stack, grads: Sequence[Tensor], config: GaLoreConfig, seed: int) -> Tensor:
    """Bases of one logical matrix of each: from rows where they lie, or, where those are few or needed whole, gathered.

    Args:
        held: equal weights.
        stack: their matrices.
        grads: their local rows.
        config, seed: of the optimizer.
    """
    matrix, ranks = stack.matrix, held[0].shard.ranks
    rows = stored_rows(matrix, held[0].shard.rows).to(grads[0].device)  # [blocks, block rows]
    if matrix.lends_heads:
        by_head = rows.unflatten(1, (matrix.heads_per_block, matrix.head_dim))
        heads = draw_heads(stack.jobs, config, seed, lambda: torch.cat(_energies_of_heads(held, by_head, grads)))
        block = torch.arange(matrix.blocks, device=rows.device)[:, None]
        lent = [by_head[block, own].flatten(1) for own in stack.split(heads)]
    else:
        lent = [rows] * len(held)
    if _stays(matrix, config):
        own = [G[_own_rows(w, matrix)].unsqueeze(0) for w, G in zip(held, grads, strict=True)]
        most = max(part.shape[1] for part in own)  # a row of zeros adds nothing to a sum over rows
        filled = [
            part if part.shape[1] == most else torch.nn.functional.pad(part, (0, 0, 0, most - part.shape[1]))
            for part in own
        ]
        return find_bases(stack, filled, config, seed, reduce=ranks.sum)
    found = grads[0].new_empty(len(held), *lent[0].shape, matrix.columns)
    for here, w, each, G in zip(found, held, lent, grads, strict=True):
        here.copy_(_of_rows(w, each, G))
    return find_bases(stack, list(ranks.sum(found).unbind()), config, seed)


def _own_rows(w: Held, matrix: LogicalMatrix) -> Any:
    """The local rows of a matrix of one block that this process owns: a slice where they follow one another."""
    owned, first = w.shard.owned, w.shard.first
    if matrix.outer == 1:
        start = max(owned.start, matrix.start - first)
        return slice(start, max(start, min(owned.stop, matrix.start + matrix.length - first)))
    local = stored_rows(matrix, w.shard.rows).flatten() - first
    return local[(local >= owned.start) & (local < owned.stop)]


def _of_rows(w: Held, rows: Tensor, G: Tensor) -> Tensor:
    """Rows of the whole gradient, zeros where another process owns them: [*rows, n]."""
    if not w.shard.local_rows:
        return G.new_zeros(*rows.shape, w.shard.columns)
    local = rows - w.shard.first
    own = (local >= w.shard.owned.start) & (local < w.shard.owned.stop)
    return torch.where(own.unsqueeze(-1), G[local.clamp(0, w.shard.local_rows - 1)], 0.0)


def _energies_of_heads(held: Sequence[Held], rows: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
    """Squared norm of each head's gradient, [blocks, heads] of each weight; rows are [blocks, heads, d]."""
    own = [_of_rows(w, rows, G).float().square().sum(dim=(-2, -1)) for w, G in zip(held, grads, strict=True)]
    return list(held[0].shard.ranks.sum(torch.stack(own)).unbind())


def _carry_over(w: Held, whole: Stack, pieces: Sequence[Piece], P: Tensor, config: GaLoreConfig) -> Tensor:
    """Carry the local moments over to new bases; returns these, with their signs."""
    mode, betas = config.momentum_transfer, w.group["betas"]
    states = _piece_states(w.state, [pieces])
    for piece, state in zip(pieces, states, strict=True):
        stack = w.stack(piece, state)
        old = stack.read()
        new = galore.change_basis(old, P[piece.bases], "right", mode, betas=betas)
        if new.M is not old.M:
            stack.write_moments(new, purpose=".refresh")
        if mode == "reset":
            reset_residual(stack)
    commit(w.state, states, w.shard.local_rows)
    if mode == "reset" and not pieces:
        ages = (whole.jobs[0].prefix + key for key in (AGE, RESIDUAL_AGE))
        w.state.update({key: torch.zeros_like(w.ok) for key in ages if key in w.state})
    old_P, nothing = whole.get_basis(), P.new_zeros(len(P), 1, P.shape[-1])
    age = P.new_zeros(len(P), 1, 1)
    return galore.change_basis(galore.MatrixState(old_P, nothing, nothing, age), P, "right", mode, betas=betas).P


def _energies(w: Held, pieces: Sequence[Piece], G: Tensor, P: Tensor) -> Tensor:
    """Squared norms of what this process owns of a matrix's gradient, and of its projection: [2]."""
    own = torch.zeros(w.shard.local_rows, device=G.device)
    own[w.shard.owned] = 1.0
    totals = torch.zeros(2, device=G.device)
    for piece in pieces:
        X = G[piece.at].view(piece.blocks, piece.block_rows, -1)
        R = galore.project(X, P[piece.bases], "right")
        norms = torch.stack([torch.linalg.vector_norm(each, dim=-1, dtype=torch.float32) for each in (X, R)])
        totals += (norms.square() * own[piece.at].view(norms.shape[1:])).sum(dim=(1, 2))
    return totals
