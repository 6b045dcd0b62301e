"""The sparsely coded residual: Adam on a few entries of what the projection loses.

Legend (shapes without the leading ``blocks`` dimension; G, R, P, lift as in ``core/galore.py``):
    D = G - lift(R)   what the projection loses, m x n; never part of the state
    S                 support of k entries a line (``core/sparse.py``); D[S] is lines x k
    m_S, v_S, u       moments of D[S] and their age in steps

While P is fixed, and if M started at zero, the part of the first moment that is lost is the moving average of D:

    m_S <- b1 m_S + (1 - b1) D[S]           v_S <- b2 v_S + (1 - b2) D[S]^2
    W[S] <- W[S] - lr scale residual_scale (m_S / (1 - b1^u)) / (sqrt(v_S / (1 - b2^u)) + eps)

With ``residual_mode: moments`` D corrects the moments at S before they are normalised, and v_S averages G[S]^2:

    A <- lift(M / (1 - b1^t))[S] + m_S / (1 - b1^u)                         v_S <- b2 v_S + (1 - b2) G[S]^2
    W[S] <- W[S] - lr wd W[S] - lr scale size A / (sqrt(v_S / (1 - b2^u)) + eps)        in place of lift(N)[S]

If P has stayed since t = 0 and u = t, A is the average of G[S]: with lr scale size = lr this is AdamW.

S is chosen once. The first step takes the 4 k largest entries of |D| as candidates. ``residual_warmup_steps`` steps
average D there; the k candidates with the largest averages become S. So no dense average is needed.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from galore_trainer.core.galore import CHUNK, chunk_of, lift, normalised, unbiased
from galore_trainer.core.sparse import Support, read_at

CANDIDATES_PER_ENTRY = 4  # candidates for one entry of the support


def support_size(rows: int, columns: int, percent: float, balanced: bool) -> tuple[int, int]:
    """Number of lines of a support and entries a line, at least one.

    Args:
        rows, columns: of a block.
        percent: share of its entries, in percent.
        balanced: whether every row has equally many entries; else one line spans the block.
    """
    if balanced:
        return rows, max(1, round(columns * percent / 100.0))
    return 1, max(1, round(rows * columns * percent / 100.0))


def choose(scores: Tensor, lines: int, entries: int) -> Tensor:
    """Positions of the largest scores [blocks, rows, n], in rising order: int32 [blocks, lines, entries]."""
    by_line = scores.reshape(len(scores), lines, -1)
    return by_line.topk(min(entries, by_line.shape[-1]), dim=-1).indices.sort(dim=-1).values.int()


def best_candidates(index: Tensor, mean: Tensor, entries: int) -> Tensor:
    """The ``entries`` candidates of every line with the largest averages, in rising order.

    Args:
        index: positions of the candidates [blocks, lines, c].
        mean: moving averages of D there, in the same shape.
        entries: at most c.
    """
    best = mean.abs().topk(entries, dim=-1).indices
    return index.gather(-1, best).sort(dim=-1).values


def dense_loss(G: Tensor, R: Tensor, P: Tensor, side: str) -> Tensor:
    """D [blocks, m, n] in the dtype of R."""
    return lift(R, P, side).neg_().add_(G)


def largest_lost(G: Tensor, R: Tensor, P: Tensor, side: str, lines: int, entries: int) -> tuple[Tensor, Tensor]:
    """Positions of the largest entries of |D|, as from ``choose``, and D there."""
    blocks, m, n = G.shape
    size = max(1, chunk_of(G.device) // (blocks * n)) if lines == m else m  # a global line needs all of D
    chunks = []
    for start in range(0, m, size):
        rows = slice(start, start + size)
        factors = (R[:, rows], P) if side == "right" else (R, P[:, rows])
        D = dense_loss(G[:, rows], *factors, side)
        index = choose(D.abs(), D.shape[1] if lines == m else 1, entries)
        chunks.append((index, read_at(D, Support(index, n))))
    positions, values = (torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
    return positions, values


def lost_at(G_S: Tensor, R: Tensor, P: Tensor, side: str, support: Support) -> Tensor:
    """D[S] = G[S] - lift(R)[S], from rows of R and P alone.

    Args:
        G_S: G[S], [blocks, lines, k].
        R, P, side: the projected gradient, its basis and its side.
        support: S.

    Returns:
        [blocks, lines, k], in the dtype of R.
    """
    left, right = (R, P) if side == "right" else (P, R.mT)  # lift = left right^T; [m, r] and [n, r]
    (blocks, m, r), n = left.shape, right.shape[-2]
    if samples(R.device) and support.by_row(m) and type(R) is Tensor:
        if blocks == 1:  # no copy by ``stack``
            return _sampled(G_S, left[0], right[0], support.positions)
        by_block = zip(G_S, left, right, support.positions, strict=True)
        return torch.stack([_sampled(*block) for block in by_block])
    # Blocks are laid one below the other, so that one index selects rows of all of them.
    start = torch.arange(blocks, dtype=torch.int64, device=R.device)[:, None, None]
    row, column = support.coordinates(m)
    left_rows, right_rows = left.reshape(-1, r), right.reshape(-1, r)
    i, j = (start * m + row).flatten(), (start * n + column).flatten()
    width = max(1, CHUNK // r)  # entries of S at a time
    lifted = [
        left_rows.index_select(0, a).mul_(right_rows.index_select(0, b)).sum(dim=-1)
        for a, b in zip(i.split(width), j.split(width), strict=True)
    ]
    return G_S - torch.cat(lifted).view(support.positions.shape)


def lifted_at(N: Tensor, P: Tensor, side: str, support: Support) -> Tensor:
    """lift(N)[S], [blocks, lines, k]."""
    nothing = torch.zeros(support.positions.shape, dtype=N.dtype, device=N.device)
    return lost_at(nothing, N, P, side, support).neg_()


def correct(
    m: Tensor,
    v: Tensor,
    u: Tensor,
    D: Tensor,
    G_S: Tensor,
    lifted: Tensor,
    ok: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take D[S] and G[S] into the moments of S, and normalise the corrected ones: the new (m, v), and N_S.

    Args:
        m, v, u: moments [blocks, lines, k] and their age before this step, [blocks, 1, 1].
        D, G_S: D[S] and G[S].
        lifted: lift of the unbiased first moment, at S.
        ok: [blocks, 1, 1]; where it is 0, m and v stay and N_S is 0.
        betas, eps: as in the equations.
    """
    b1, b2 = betas
    D, G_S = (torch.where(ok > 0.0, x, 0.0) for x in (D, G_S))  # a product with 0 would keep NaN
    u, ok = u + ok, ok.to(D.dtype)
    m = torch.lerp(m, D, ok * (1.0 - b1))
    v = torch.lerp(v, G_S * G_S, ok * (1.0 - b2))
    return m, v, normalised(ok * (lifted + unbiased(m, u, b1)), unbiased(v, u, b2), eps)


def samples(device: torch.device) -> bool:
    """Whether ``sampled_addmm`` is faster on a device than gathering rows."""
    return device.type == "cpu"


def _sampled(G_S: Tensor, left: Tensor, right: Tensor, positions: Tensor) -> Tensor:
    """G[S] - (left right^T)[S] for one block, in the shape of ``positions`` [..., m, k], by torch's sampled product."""
    (m, k), n = positions.shape[-2:], len(right)
    _silence_beta_warning()
    pattern = torch.sparse_csr_tensor(
        _row_offsets(m, k, positions.dtype),
        positions.reshape(-1),
        G_S.reshape(-1),
        (m, n),
        check_invariants=False,
        device=G_S.device,
    )
    return torch.sparse.sampled_addmm(pattern, left, right.mT, alpha=-1.0).values().view(positions.shape)


@functools.lru_cache(maxsize=64)
def _row_offsets(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """CSR row offsets of m rows with k entries. The cache outlives a default device of torch, hence ``device``."""
    return torch.arange(0, m * k + 1, k, dtype=dtype, device="cpu")


@functools.cache
def _silence_beta_warning() -> None:
    """Trigger torch's warning about sparse CSR tensors, which it gives once a process, where it is ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends = torch.tensor([0, 1], dtype=torch.int64, device="cpu")
        one = torch.ones(1, dtype=torch.float32, device="cpu")
        torch.sparse_csr_tensor(ends, ends[:1], one, (1, 1), check_invariants=False, device=one.device)
