"""The sparsely coded residual: Adam on a few entries of what the projection loses.

Legend (shapes without the leading ``blocks`` dimension; G, R, P, lift as in ``core/galore.py``):
    D = G - lift(R)   what the projection loses, m x n; never kept
    S                 support of k entries a line (see ``core/sparse.py``); D[S] has its shape
    m_S, v_S, u       moments of D[S] and their age

While P is fixed and M started at zero, the lost part of the first moment is exactly the moving average of D:

    m_S <- b1 m_S + (1 - b1) D[S]           v_S <- b2 v_S + (1 - b2) D[S]^2
    W[S] <- W[S] - lr scale residual_scale (m_S / (1 - b1^u)) / (sqrt(v_S / (1 - b2^u)) + eps)

S is chosen once. At the first step the 4 k largest entries of |D| become candidates; over ``residual_warmup_steps``
steps their moving average is kept, then the best k are S. A dense accumulator exists in the tests only.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from galore_trainer.core.galore import lift
from galore_trainer.core.sparse import Support, read_at

CANDIDATES = 4  # for each entry of the support
CHUNK = 1 << 24  # products held at a time while D[S] is formed


def support_size(rows: int, columns: int, percent: float, balanced: bool) -> tuple[int, int]:
    """Lines and entries a line of a support that holds ``percent`` % of rows x columns entries, at least one a line."""
    if balanced:
        return rows, max(1, round(columns * percent / 100.0))
    return 1, max(1, round(rows * columns * percent / 100.0))


def choose(scores: Tensor, lines: int, entries: int) -> Tensor:
    """The positions of the largest scores in rising order: [blocks, rows, n] to int32 [blocks, lines, entries]."""
    by_line = scores.reshape(len(scores), lines, -1)
    return by_line.topk(min(entries, by_line.shape[-1]), dim=-1).indices.sort(dim=-1).values.int()


def best_candidates(index: Tensor, mean: Tensor, entries: int) -> Tensor:
    """Of candidates [blocks, lines, c] with moving averages ``mean``, the ``entries`` largest in every line."""
    best = mean.abs().topk(entries, dim=-1).indices
    return index.gather(-1, best).sort(dim=-1).values


def dense_loss(G: Tensor, R: Tensor, P: Tensor, side: str) -> Tensor:
    """D in the dtype of R: formed for a moment while candidates are found and averaged, never kept."""
    return lift(R, P, side).neg_().add_(G)


def largest_lost(G: Tensor, R: Tensor, P: Tensor, side: str, lines: int, entries: int) -> tuple[Tensor, Tensor]:
    """Where |D| is largest, as ``choose`` gives it, and D there; where lines are rows, some are formed at a time."""
    blocks, m, n = G.shape
    at_a_time = CHUNK >> 6 if samples(G.device) else CHUNK  # entries, so few that they stay in a CPU's cache
    size = max(1, at_a_time // (blocks * n)) if lines == m else m
    found = []
    for start in range(0, m, size):
        rows = slice(start, start + size)
        factors = (R[:, rows], P) if side == "right" else (R, P[:, rows])
        D = dense_loss(G[:, rows], *factors, side)
        index = choose(D.abs(), D.shape[1] if lines == m else 1, entries)
        found.append((index, read_at(D, Support(index, n))))
    positions, values = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return positions, values


def lost_at(G_S: Tensor, R: Tensor, P: Tensor, side: str, support: Support) -> Tensor:
    """D[S] = G[S] - lift(R)[S] in the dtype of R, in the positions' shape, from G[S] and rows of R and P alone."""
    left, right = (R, P) if side == "right" else (P, R.mT)  # lift = left right^T; [m, r] and [n, r]
    (blocks, m, r), n = left.shape, right.shape[-2]
    if samples(R.device) and support.by_row(m) and type(R) is Tensor:
        if blocks == 1:  # as most are: nothing is copied
            return _sampled(G_S, left[0], right[0], support.positions)
        each = zip(G_S, left, right, support.positions, strict=True)
        return torch.stack([_sampled(*block) for block in each])
    # blocks one after the other: one index does for all
    start = torch.arange(blocks, dtype=torch.int64, device=R.device)[:, None, None]
    row, column = support.coordinates(m)
    left_rows, right_rows = left.reshape(-1, r), right.reshape(-1, r)
    i, j = (start * m + row).flatten(), (start * n + column).flatten()
    width = max(1, CHUNK // r)
    lifted = [
        left_rows.index_select(0, a).mul_(right_rows.index_select(0, b)).sum(dim=-1)
        for a, b in zip(i.split(width), j.split(width), strict=True)
    ]
    return G_S - torch.cat(lifted).view(support.positions.shape)


def samples(device: torch.device) -> bool:
    """Whether torch samples products there faster than rows can be gathered."""
    return device.type == "cpu"


def _sampled(G_S: Tensor, left: Tensor, right: Tensor, positions: Tensor) -> Tensor:
    """G[S] less the entries of left right^T [m, n] at ``positions`` [..., m, k], by torch's sampled product."""
    (m, k), n = positions.shape[-2:], len(right)
    _quieten()
    pattern = torch.sparse_csr_tensor(
        _ends(m, k, positions.dtype),
        positions.reshape(-1),
        G_S.reshape(-1),
        (m, n),
        check_invariants=False,
        device=G_S.device,
    )
    return torch.sparse.sampled_addmm(pattern, left, right.mT, alpha=-1.0).values().view(positions.shape)


@functools.lru_cache(maxsize=64)
def _ends(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Where rows of k entries end; on the CPU, whatever torch's default device was when it was first asked for."""
    return torch.arange(0, m * k + 1, k, dtype=dtype, device="cpu")


@functools.cache
def _quieten() -> None:
    """Let torch say once, unheard, that sparse tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends = torch.tensor([0, 1], dtype=torch.int64, device="cpu")
        one = torch.ones(1, dtype=torch.float32, device="cpu")
        torch.sparse_csr_tensor(ends, ends[:1], one, (1, 1), check_invariants=False, device=one.device)
