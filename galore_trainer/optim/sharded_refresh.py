"""New bases for weights of which this process holds a part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core import galore
from galore_trainer.core.galore import widen
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.optim.held import Held, piece_states
from galore_trainer.optim.parts import width_of_sketch
from galore_trainer.optim.pieces import Piece, commit, stored_rows
from galore_trainer.optim.refresh import count_refresh, draw_heads, find_bases
from galore_trainer.optim.residual_state import AGE as RESIDUAL_AGE
from galore_trainer.optim.residual_state import reset_residual
from galore_trainer.optim.stack import AGE, Stack, runs
from galore_trainer.optim.update import REFRESH_ELEMENTS, STACK_ELEMENTS, stack_elements

if TYPE_CHECKING:
    from galore_trainer.optim.galore_adamw import GaLoreAdamW


def alike(held: Sequence[Held], optimizer: GaLoreAdamW) -> Iterator[list[Held]]:
    """Equal weights whose bases are found together, the same on every process; not too many at a time."""
    config, asked = optimizer.config, optimizer.max_stack_elements

    def elements(w: Held) -> int:
        """Of rows that stay where they are this process's share; gathered ones are all here, and copied."""
        per_copy = REFRESH_ELEMENTS // STACK_ELEMENTS
        sizes = (
            m.rows * m.columns // w.shard.ranks.count if _stays(m, config) else per_copy * math.prod(m.lending_shape)
            for m in w.matrices
        )
        return sum(sizes)

    groups: dict[Any, list[Held]] = {}
    for w in held:
        shard, first = w.shard, w.state["refreshes"] == 0
        key = (shard.ranks, shard.rows, shard.columns, w.made_in, tuple(w.matrices), first)
        groups.setdefault(key, []).append(w)
    for members in groups.values():
        yield from runs(members, elements, stack_elements(members[0].weight.device, asked, REFRESH_ELEMENTS))


def _stays(matrix: LogicalMatrix, config: GaLoreConfig) -> bool:
    """Whether a basis is found from rows where they lie: not where few rows lend it, or all are needed in one place."""
    _, rows, columns = matrix.lending_shape
    smaller = min(rows, columns)
    thin = width_of_sketch(matrix, config, smaller, smaller) < smaller
    return config.svd == "randomized" and matrix.blocks == 1 and thin and not matrix.lends_heads


def refresh_held(optimizer: GaLoreAdamW, held: Sequence[Held]) -> None:
    """New bases for equal weights, the same on every process, and their local moments carried over."""
    config, first = optimizer.config, held[0].state["refreshes"] == 0
    grads = [w.gradient().to(w.made_in) for w in held]
    names: list[str] = []
    energies: list[Tensor] = []
    for j in range(len(held[0].matrices)):
        stack = Stack([w.job(w.matrices[j], w.state) for w in held])
        each = stack.split(_bases(held, stack, grads, config, optimizer.seed))
        if not first:
            triples = zip(held, stack.jobs, each, strict=True)
            each = [_carry_over(w, Stack([job]), w.pieces[j], P, config) for w, job, P in triples]
        bases = stack.split(stack.put_basis(torch.cat(list(each))))
        names += [job.name for job in stack.jobs]
        energies += [_energies(w, w.pieces[j], G, P) for w, G, P in zip(held, grads, bases, strict=True)]
    whole, kept = held[0].shard.ranks.sum(torch.stack(energies)).unbind(dim=1)
    errors = galore.error_from_norms(whole.sqrt(), kept.sqrt())
    optimizer.projection_errors.update(zip(names, errors.unbind(), strict=True))
    for w in held:
        count_refresh(w.state, w.group, config)


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
        block = torch.arange(matrix.blocks, dtype=torch.int64, device=rows.device)[:, None]
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
    own = [widen(_of_rows(w, rows, G)).square().sum(dim=(-2, -1)) for w, G in zip(held, grads, strict=True)]
    return list(held[0].shard.ranks.sum(torch.stack(own)).unbind())


def _carry_over(w: Held, whole: Stack, pieces: Sequence[Piece], P: Tensor, config: GaLoreConfig) -> Tensor:
    """Carry the local moments over to new bases; returns these, with their signs."""
    mode, betas = config.momentum_transfer, w.group["betas"]
    states = piece_states(w.state, [pieces])
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
    own = torch.zeros(w.shard.local_rows, dtype=P.dtype, device=G.device)
    own[w.shard.owned] = 1.0
    totals = torch.zeros(2, dtype=P.dtype, device=G.device)
    for piece in pieces:
        X = piece.of(G).view(piece.blocks, piece.block_rows, -1)
        R = galore.project(X, P[piece.bases], "right")
        norms = torch.stack([torch.linalg.vector_norm(each, dim=-1, dtype=P.dtype) for each in (X, R)])
        totals += (norms.square() * own[piece.at].view(norms.shape[1:])).sum(dim=(1, 2))
    return totals
