"""GaLore-AdamW on one logical matrix: the algorithm on one page.

Legend (shapes without the leading ``blocks`` dimension):
    W  weight            m x n        P  basis, orthonormal columns   n x r (right) | m x r (left)
    G  gradient          m x n        R  projected gradient           m x r (right) | r x n (left)
    M, V  moments of R, same shape    N  normalised update            same shape as R
    t  steps in the moments           ok  1.0 where R is usable, else 0.0: then nothing moves
                                      (t and ok: [blocks, 1, 1])

One step, with P fixed between two refreshes:

    R = project(G)
    M <- b1 M + (1 - b1) R                  V <- b2 V + (1 - b2) R * R
    N  = (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)
    W <- W - lr wd W - lr scale lift(N)

Functions return new tensors; ``apply_update_`` alone changes its first argument. No function waits for the device.
Sources: Zhao et al., arXiv 2403.03507; Liao et al., arXiv 2412.19820; moment rotation as in LDAdam, arXiv 2410.16103.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from galore_trainer.core.sparse import Support, add_at_

MULTIPLIES_BF16 = {"cuda"}  # types of devices that multiply bfloat16 factors into float32 without converting them
CHUNK = 1 << 24  # entries of a weight that is not float32 held in float32 at a time


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a weight's state and of its step: float64 for float64 weights, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """A tensor in its ``compute_dtype``."""
    return x.to(compute_dtype(x.dtype))


def largest_usable(dtype: torch.dtype) -> float:
    """The magnitude below which the second moment of an entry stays finite, with room for sums of a few squares.

    About 1e18 for float32 state. A gradient above it would make second moments infinite, and a later change of basis
    would turn them into NaN; its step is skipped like that of a gradient that is not finite.
    """
    return math.sqrt(torch.finfo(compute_dtype(dtype)).max) / 16.0


def matmul_wide(A: Tensor, B: Tensor) -> Tensor:
    """A B, accumulated and returned in ``compute_dtype``; bfloat16 factors are multiplied as such where devices can."""
    if A.dtype == B.dtype and A.dtype in (torch.float32, torch.float64):
        return A @ B
    if A.device.type in MULTIPLIES_BF16 and A.dtype == torch.bfloat16:
        return torch.bmm(A, B.to(A.dtype), out_dtype=torch.float32)
    wide = compute_dtype(torch.promote_types(A.dtype, B.dtype))
    return A.to(wide) @ B.to(wide)


def project(G: Tensor, P: Tensor, side: str) -> Tensor:
    """R = G P (right) or P^T G (left)."""
    P = P.to(G.dtype)
    return matmul_wide(G, P) if side == "right" else matmul_wide(P.mT, G)


def lift(N: Tensor, P: Tensor, side: str) -> Tensor:
    """N P^T (right) or P N (left): back to the weight's shape."""
    return matmul_wide(N, P.mT) if side == "right" else matmul_wide(P, N)


def decay_sum(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t, accurate for small t and beta near one."""
    return -torch.expm1(t * math.log(beta)) if beta > 0.0 else torch.ones_like(t)


def usable_parts(R: Tensor, parts: int) -> Tensor:
    """float32 [parts]: 1.0 where all entries of a part of the blocks of R are below ``largest_usable``, else 0.0.

    A non-finite entry of G makes its row or column of R non-finite, so looking at R is enough.
    """
    limit = largest_usable(R.dtype)
    # A norm below the limit shows it for all parts. It is the faster pass on a CPU, where reading it costs nothing.
    if type(R) is Tensor and R.device.type == "cpu" and torch.linalg.vector_norm(R).item() < limit:
        return torch.ones(parts, dtype=torch.float32, device=R.device)
    largest = torch.linalg.vector_norm(R.reshape(parts, -1), float("inf"), dim=1)
    return (largest < limit).to(torch.float32)  # False for NaN too


def adam(
    M: Tensor, V: Tensor, t: Tensor, R: Tensor, ok: Tensor, *, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take R into the moments and normalise: (M, V, t, N). Where ``ok`` is 0 moments stay and N is 0.

    The residual's entries go through it too.
    """
    b1, b2 = betas
    R = torch.where(ok > 0.0, R, 0.0)
    t = t + ok
    ok = ok.to(R.dtype)
    M = torch.lerp(M, R, ok * (1.0 - b1))
    V = torch.lerp(V, R * R, ok * (1.0 - b2))
    t1 = t.to(R.dtype).clamp(min=1.0)  # t = 0 only before the first usable gradient: M = V = 0, and N must be 0
    N = ok * (M / decay_sum(b1, t1)) / ((V / decay_sum(b2, t1)).sqrt() + eps).clamp(min=torch.finfo(R.dtype).tiny)
    return M, V, t, N


def with_signs_of(P: Tensor, old: Tensor) -> Tensor:
    """New bases whose columns take the signs that overlap with the old ones, so that moments stay (``align``)."""
    overlap = (old * P).sum(dim=-2, keepdim=True)
    return torch.where(overlap < 0.0, -P, P)


def rotate(
    M: Tensor, V: Tensor, t: Tensor, old: Tensor, P: Tensor, side: str, *, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Moments of age t in new bases: mapped by C = old^T P, second moments as in LDAdam."""
    C = old.mT @ P  # r x r
    along = (lambda A, C: A @ C) if side == "right" else (lambda A, C: C.mT @ A)
    t1 = t.to(M.dtype).clamp(min=1.0)
    f1, f2 = decay_sum(betas[0], t1), decay_sum(betas[1], t1)
    Mh, Vh = M / f1, V / f2
    M = along(M, C)
    V = f2 * (along(Vh - Mh * Mh, C * C) + (M / f1) ** 2).abs()
    return M, V


def error_from_norms(whole: Tensor, kept: Tensor) -> Tensor:
    """||G - lift(R)|| / ||G|| from the Frobenius norms of G and of R = project(G), which suffice: P is orthonormal."""
    share = kept / whole.clamp(min=torch.finfo(torch.float32).tiny)
    return (1.0 - share * share).clamp(min=0.0).sqrt()


def lost_share(G: Tensor, P: Tensor, side: str, parts: int = 1) -> Tensor:
    """||G - lift(R)|| / ||G|| from the lost part itself: exact for small errors too, where norms of wholes cancel."""
    G = widen(G)
    D = G - lift(project(G, P, side), P, side)
    lost, whole = (torch.linalg.vector_norm(x.reshape(parts, -1), dim=1) for x in (D, G))
    return lost / whole.clamp(min=torch.finfo(torch.float32).tiny)


def apply_update_(
    W: Tensor,
    N: Tensor,
    P: Tensor,
    side: str,
    *,
    lr: float,
    scale: float,
    weight_decay: float,
    ok: Tensor,
    sparse: tuple[Support, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """W <- W - lr wd W - lr scale (lift(N) + N_S at S), in place; not at all where ``ok`` is 0 (N, N_S are 0 there).

    Args:
        W: [blocks, m, n]. float32 and float64 take the product in place; other dtypes go through float32.
        N, P, side: as returned by ``adam`` and kept in the state.
        ok: [blocks, 1, 1], 1.0 or 0.0.
        sparse: S and N_S, the residual's support and update (``core/residual.py``).
        generator: rounds a bfloat16 weight stochastically; None rounds to nearest.
    """
    if W.dtype in (torch.float32, torch.float64):
        if weight_decay != 0.0:
            W.mul_(1.0 - ok.to(W.dtype) * (lr * weight_decay))
        left, right = (N, P.mT) if side == "right" else (P, N)
        W.baddbmm_(left, right, alpha=-lr * scale)
        if sparse is not None:
            add_at_(W, *sparse, alpha=-lr * scale)
        return
    low = torch.bfloat16 if W.dtype == torch.bfloat16 and W.device.type in MULTIPLIES_BF16 else torch.float32
    N, P = N.to(low), P.to(low)
    for rows in _row_chunks(W, sparse[0] if sparse else None):  # few of them are held in float32 at a time
        left, right = (N[:, rows], P) if side == "right" else (N, P[:, rows])
        new = W[:, rows].float() * (1.0 - ok * (lr * weight_decay)) - (lr * scale) * lift(left, right, side)
        if sparse is not None:
            support, values = sparse
            here = rows if support.by_row(W.shape[-2]) else slice(None)
            add_at_(new, Support(support.positions[:, here], support.columns), values[:, here], alpha=-lr * scale)
        if generator is not None and W.dtype == torch.bfloat16:
            new = stochastic_round(new, generator)
        W[:, rows].copy_(new)


def _row_chunks(W: Tensor, support: Support | None) -> Iterator[slice]:
    """Slices of rows with at most ``CHUNK`` entries; one for all where a support counts through the whole matrix."""
    blocks, m, n = W.shape
    size = m if support is not None and not support.by_row(m) else max(1, CHUNK // (blocks * n))
    return (slice(start, min(start + size, m)) for start in range(0, m, size))


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down with the probability that makes the expectation exact."""
    return round_bits(x, torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32))


def round_bits(x: Tensor, noise: Tensor) -> Tensor:
    """``stochastic_round`` with noise from 0 to 2^16 - 1, int32.

    A bfloat16 is the upper half of a float32: adding a uniform 16-bit integer before cutting the lower half carries
    into the upper one with probability (lower half) / 2^16. Infinities and NaN stay as they are.
    """
    rounded = ((x.contiguous().view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)
