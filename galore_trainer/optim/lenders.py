"""Which rows give a matrix its bases: all of a block, or those of some heads, wherever they lie; what bases lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core import galore
from galore_trainer.core.basis import REDUCES
from galore_trainer.core.galore import widen
from galore_trainer.core.linalg import Reduce, least_error
from galore_trainer.core.matrix import LogicalMatrix, stored_rows
from galore_trainer.core.streams import stream
from galore_trainer.optim.bucket import Bucket
from galore_trainer.optim.kept import norms_of_tensors, width_of_sketch
from galore_trainer.optim.local import LocalWeight, Piece


def lending_rows(bucket: Bucket, config: GaLoreConfig, seed: int) -> tuple[Sequence[Tensor], Reduce | None]:
    """The rows that give each block its basis, and how to sum over the processes that hold others.

    Args:
        bucket: whole matrices that are due, of whole weights or of cut ones.
        config: gives ``head_choice``.
        seed: of the run.

    Returns:
        [blocks, lending rows, n] of every matrix, in the dtype in which its gradient was made. Without a ``Reduce``
        these are all rows, else those of this process.
    """
    if bucket.pieces[0].owner.shard.is_whole:
        return lending_rows_of_whole(bucket, bucket.gradients(), config, seed), None
    return _rows_of_cut(bucket, config, seed)


def lending_rows_of_whole(bucket: Bucket, G: Sequence[Tensor], config: GaLoreConfig, seed: int) -> Sequence[Tensor]:
    """The lending rows of whole gradients ``G``, each [blocks, rows, n]."""
    matrix = bucket.matrix
    if not matrix.lends_heads:
        return G
    heads = draw_heads(bucket, config, seed, lambda: torch.cat([matrix.energy(part) for part in G]))
    return [matrix.lend(part, lenders) for part, lenders in zip(G, bucket.split(heads), strict=True)]


def stays(matrix: LogicalMatrix, config: GaLoreConfig) -> bool:
    """Whether a basis is found from rows where they lie: not where few rows lend it, or all are needed in one place."""
    _, rows, columns = matrix.lending_shape
    smaller = min(rows, columns)
    thin = width_of_sketch(matrix, config, smaller, smaller) < smaller
    return config.svd in REDUCES and matrix.blocks == 1 and thin and not matrix.lends_heads


def draw_heads(bucket: Bucket, config: GaLoreConfig, seed: int, energy: Callable[[], Tensor]) -> Tensor:
    """The heads that lend their rows, [pieces x blocks, lenders], rising.

    Args:
        bucket: of equal matrices.
        config: gives ``head_choice``.
        seed: of the run.
        energy: squared norms of the heads' gradients, [pieces x blocks, heads], where the choice asks for them.
    """
    matrix, device = bucket.matrix, bucket.device
    if config.head_choice == "energy":
        return energy().topk(matrix.lenders, dim=-1).indices.sort(dim=-1).values
    if config.head_choice == "random":
        heads = torch.cat([_random_heads(piece, seed) for piece in bucket.pieces])
        return heads.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else heads.to(device)
    return torch.arange(matrix.lenders, dtype=torch.int64, device=device).expand(len(bucket.pieces) * matrix.blocks, -1)


def _random_heads(piece: Piece, seed: int) -> Tensor:
    """Drawn on the CPU, so that every type of device lends the same heads: [blocks, lenders]."""
    matrix, refresh = piece.matrix, piece.owner.state["refreshes"]
    draws = (stream("cpu", seed, piece.name, "head", refresh, b) for b in range(matrix.blocks))
    count = matrix.heads_per_block
    heads = torch.stack([torch.randperm(count, generator=g, dtype=torch.int64, device="cpu") for g in draws])
    return heads[:, : matrix.lenders].sort(dim=-1).values


def norms_of_projection(bucket: Bucket, P: Tensor) -> tuple[Tensor, Tensor]:
    """Frobenius norms of the whole gradients and of their projections by new bases ``P``, [pieces] each."""
    bases = bucket.split(P)
    if bucket.pieces[0].owner.shard.is_whole:
        G = bucket.gradients()
        R = [galore.project(part, P_of, bucket.matrix.side) for part, P_of in zip(G, bases, strict=True)]
        whole, projected = (torch.stack(norms_of_tensors(tensors)) for tensors in (G, R))
        return whole, projected
    squares = torch.stack([_owned_squares(piece, P_of) for piece, P_of in zip(bucket.pieces, bases, strict=True)])
    whole, projected = bucket.pieces[0].owner.ranks.sum(squares).sqrt().unbind(dim=1)
    return whole, projected


# ---------------------------------------------------------------------- cut weights


def _rows_of_cut(bucket: Bucket, config: GaLoreConfig, seed: int) -> tuple[Sequence[Tensor], Reduce | None]:
    weights, matrix = [piece.owner for piece in bucket.pieces], bucket.matrix
    ranks, grads = weights[0].ranks, [w.gradient().to(w.made_in) for w in weights]
    if stays(matrix, config):
        pairs = zip(bucket.pieces, grads, strict=True)
        parts = [G[_rows_owned(piece.owner, piece.matrix)].unsqueeze(0) for piece, G in pairs]
        most = max(part.shape[1] for part in parts)
        return [_with_rows(part, most) for part in parts], ranks.sum
    # equal matrices may lie at other rows of their weights, as q, k and v of a fused one do
    each = [stored_rows(piece.matrix, piece.owner.shard.rows) for piece in bucket.pieces]
    rows = torch.stack(each).to(bucket.device)  # [weights, blocks, block rows]
    if matrix.lends_heads:
        by_head = rows.unflatten(2, (matrix.heads_per_block, matrix.head_dim))
        heads = draw_heads(bucket, config, seed, lambda: _energies_of_heads(weights, by_head, grads))
        block = torch.arange(matrix.blocks, dtype=torch.int64, device=rows.device)[:, None]
        lent = zip(by_head, bucket.split(heads), strict=True)
        rows = torch.stack([heads_of_weight[block, lenders].flatten(1) for heads_of_weight, lenders in lent])
    gathered = grads[0].new_empty(*rows.shape, matrix.columns)
    for here, w, wanted, G in zip(gathered, weights, rows, grads, strict=True):
        here.copy_(_owned_or_zero(w, wanted, G))
    return list(ranks.sum(gathered).unbind()), None


def _with_rows(G: Tensor, rows: int) -> Tensor:
    """G [1, m, n] with zeros below, which add nothing to a sum over rows; a copy only where rows are missing."""
    missing = rows - G.shape[1]
    return torch.nn.functional.pad(G, (0, 0, 0, missing)) if missing else G


def _rows_owned(w: LocalWeight, matrix: LogicalMatrix) -> Any:
    """The local rows of a matrix of one block that this process owns: a slice where they follow one another."""
    owned, first = w.shard.owned, w.shard.first
    if matrix.outer == 1:
        start = max(owned.start, matrix.start - first)
        return slice(start, max(start, min(owned.stop, matrix.start + matrix.length - first)))
    local = stored_rows(matrix, w.shard.rows).flatten() - first
    return local[(local >= owned.start) & (local < owned.stop)]


def _owned_or_zero(w: LocalWeight, rows: Tensor, G: Tensor) -> Tensor:
    """Rows of the whole gradient, zeros where another process owns them: [*rows, n]."""
    if not w.shard.local_rows:
        return G.new_zeros(*rows.shape, w.shard.columns)
    local = rows - w.shard.first
    is_owned = (local >= w.shard.owned.start) & (local < w.shard.owned.stop)
    return torch.where(is_owned.unsqueeze(-1), G[local.clamp(0, w.shard.local_rows - 1)], 0.0)


def _energies_of_heads(weights: Sequence[LocalWeight], rows: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """Squared norm of each head's gradient, [weights x blocks, heads]; rows are [weights, blocks, heads, d]."""
    triples = zip(weights, rows, grads, strict=True)
    squares = [widen(_owned_or_zero(w, wanted, G)).square().sum(dim=(-2, -1)) for w, wanted, G in triples]
    return weights[0].ranks.sum(torch.stack(squares)).flatten(0, 1)


def _owned_squares(piece: Piece, P: Tensor) -> Tensor:
    """Squared norms of what this process owns of a matrix's gradient, and of its projection: [2]."""
    w = piece.owner
    G = w.gradient().to(w.made_in)
    is_owned = torch.zeros(w.shard.local_rows, dtype=P.dtype, device=G.device)
    is_owned[w.shard.owned] = 1.0
    totals = torch.zeros(2, dtype=P.dtype, device=G.device)
    for rows in w.rows(piece.matrix):
        X = rows.of(G).view(rows.matrix.blocks, rows.matrix.block_rows, -1)
        R = galore.project(X, P[rows.block_index], "right")
        norms = torch.stack([torch.linalg.vector_norm(x, dim=-1, dtype=P.dtype) for x in (X, R)])
        totals += (norms.square() * is_owned[rows.at].view(norms.shape[1:])).sum(dim=(1, 2))
    return totals


# ---------------------------------------------------------------------- what a projection loses


def projection_errors(bucket: Bucket, P: Tensor) -> list[Tensor]:
    """||G - lift(R)|| / ||G|| of every matrix with new bases, scalar tensors."""
    return list(galore.error_from_norms(*norms_of_projection(bucket, P)).unbind())


def diagnose(bucket: Bucket, P: Tensor, config: GaLoreConfig, seed: int) -> tuple[Tensor, Tensor]:
    """What randomization and sharing cost, against the best that any basis could do: two tensors [pieces].

    ``excess`` is e(P) / e(exact) - 1 on the rows that were decomposed, ``sharing_excess`` e(P) / e(joint exact) on the
    whole matrix, with one basis of the same rank and side; e is the projection error. Where the best basis loses
    nothing there is nothing to compare with: 0 and 1.
    """
    matrix, grads = bucket.matrix, bucket.gradients()
    excess, sharing = [], []
    for G, lent, bases in zip(grads, lending_rows_of_whole(bucket, grads, config, seed), bucket.split(P), strict=True):
        best = least_error(lent, matrix.rank)  # 0 where the lending rows have no more directions than the rank
        excess.append(torch.where(best > 1e-6, galore.lost_share(lent, bases, matrix.side) / best, 1.0))
        whole = G.reshape(1, matrix.rows, matrix.columns) if matrix.head_dim else G
        least = least_error(whole, matrix.rank)
        sharing.append(torch.where(least > 1e-6, galore.lost_share(G, bases, matrix.side) / least, 1.0))
    return torch.cat(excess) - 1.0, torch.cat(sharing)


def projection_report(
    errors: Mapping[str, Tensor], excess_errors: Mapping[str, tuple[float, float]]
) -> dict[str, Any] | None:
    """What ``GaLoreAdamW.projection_report`` returns.

    Args:
        errors: projection error of the newest refresh, by matrix.
        excess_errors: excess and sharing excess, by matrix, where diagnosed.
    """
    if not errors:
        return None
    values = {name: error.item() for name, error in errors.items()}
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    excess, sharing = zip(*excess_errors.values(), strict=True) if excess_errors else ((), ())
    return {
        "mean": sum(finite.values()) / max(1, len(finite)),
        "excess": sum(excess) / len(excess) if excess else None,
        "sharing_excess": sum(sharing) / len(sharing) if sharing else None,
        "by_matrix": finite,
    }
