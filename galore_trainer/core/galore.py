"""GaLore-AdamW on one logical matrix: the algorithm on one page.

Legend (shapes without the leading ``blocks`` dimension):
    W     weight                       m x n
    G     gradient                     m x n
    P     basis, orthonormal columns   n x r (right) | m x r (left)
    R     projected gradient           m x r (right) | r x n (left)
    M, V  moments of R                 shape of R
    N     normalised update            shape of R
    t     steps in the moments         [blocks, 1, 1]
    ok    1.0 where R is usable,       [blocks, 1, 1]; 0.0 leaves moments and weight unchanged
          else 0.0

One step, with P fixed between two refreshes:

    R  = project(G)
    ok = usable(R)
    M <- b1 M + (1 - b1) R                  V <- b2 V + (1 - b2) R * R
    N  = (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)
    W <- W - lr wd W - lr scale lift(N)

The residuals add to lift(N): all that the projection loses (``core/scaled.py``), or a few entries of it
(``core/residual.py``), whose moments may correct M and V there instead.
A refresh replaces P (``core/basis.py``) and carries M and V over (``with_signs_of`` or ``rotate``).

Functions return new tensors, but for ``out``; ``apply_update_`` alone changes its first argument. No function waits for
the device.
Sources: Zhao et al., arXiv 2403.03507; Liao et al., arXiv 2412.19820; moment rotation as in LDAdam, arXiv 2410.16103.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from galore_trainer.core.scaled import Dense, along_lines
from galore_trainer.core.sparse import Support, add_at_

MULTIPLIES_BF16 = {"cuda"}  # device types that multiply bfloat16 factors with a float32 result
CHUNK = 1 << 24  # entries of a low-precision weight that are copied to float32 at a time

# ---------------------------------------------------------------------- one step


def project(G: Tensor, P: Tensor, side: str) -> Tensor:
    """R = G P (right) or P^T G (left), in ``compute_dtype``."""
    P = P.to(G.dtype)
    return matmul_wide(G, P) if side == "right" else matmul_wide(P.mT, G)


def usable_parts(R: Tensor, parts: int) -> Tensor:
    """Whether each part of R can enter the moments.

    A non-finite entry of G makes its row or column of R non-finite, so R shows it.

    Args:
        R: [blocks, ...].
        parts: number of equal parts along the blocks.

    Returns:
        float32 [parts]: 1.0 where all entries are below ``largest_usable``, else 0.0.
    """
    limit = largest_usable(R.dtype)
    # On a CPU one norm over all of R is faster: it bounds every entry, and reading it waits for no device. Subclasses
    # such as fake tensors may have no value to read.
    if type(R) is Tensor and R.device.type == "cpu" and torch.linalg.vector_norm(R).item() < limit:
        return torch.ones(parts, dtype=torch.float32, device=R.device)
    largest = torch.linalg.vector_norm(R.reshape(parts, -1), float("inf"), dim=1)
    return (largest < limit).to(torch.float32)  # the comparison is False for NaN


def adam(
    M: Tensor, V: Tensor, t: Tensor, R: Tensor, ok: Tensor, *, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add R to the moments and normalise: the new (M, V, t, N). Where ``ok`` is 0, M, V and t stay and N is 0.

    The residual uses it for its entries, too.
    """
    b1, b2 = betas
    R = torch.where(ok > 0.0, R, 0.0)  # a product with 0 would keep NaN
    t = t + ok
    ok = ok.to(R.dtype)
    M = torch.lerp(M, R, ok * (1.0 - b1))
    V = torch.lerp(V, R * R, ok * (1.0 - b2))
    return M, V, t, normalised(ok * unbiased(M, t, b1), unbiased(V, t, b2), eps)


def normalised(first: Tensor, second: Tensor, eps: float) -> Tensor:
    """first / (sqrt(second) + eps) of unbiased moments; 0 where both moments and eps are 0."""
    # The smallest normal number takes the place of a zero denominator.
    return first / (second.sqrt() + eps).clamp(min=torch.finfo(first.dtype).tiny)


def unbiased(average: Tensor, t: Tensor, beta: float) -> Tensor:
    """A moving average of age t that started at zero, without the bias of its start: average / (1 - beta^t)."""
    t1 = t.to(average.dtype).clamp(min=1.0)  # before the first usable gradient t = 0, and 1 - beta^0 would be 0
    return average / decay_sum(beta, t1)


def decay_sum(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t, without cancellation for small t and beta near one."""
    return -torch.expm1(t * math.log(beta)) if beta > 0.0 else torch.ones_like(t)


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
    dense: Dense | None = None,
    sparse: tuple[Support, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """W <- W - lr wd W - lr scale (lift(N) + phi D + N_S at S), in place.

    Args:
        W: [blocks, m, n]. float32 and float64 weights change in place; other dtypes are computed in float32.
        N, P, side: the update as ``adam`` returns it, its basis and its side.
        lr, scale, weight_decay: as in the equation.
        ok: [blocks, 1, 1], 1.0 or 0.0. Where it is 0, N and N_S are 0 and weight decay is left out.
        dense: for phi D, the dense residual (``core/scaled.py``).
        sparse: S and N_S, the sparse residual's support and update (``core/residual.py``).
        generator: for stochastic rounding of a bfloat16 weight; None rounds to nearest.
    """
    usable = _all_usable(ok)
    if dense is not None:
        N = _without_projected(N, dense, ok, usable, side)
    if W.dtype in (torch.float32, torch.float64):
        if weight_decay != 0.0:
            W.mul_(1.0 - ok.to(W.dtype) * (lr * weight_decay))
        # Chunks let a CPU's cache hold W between the two updates.
        for rows in [slice(None)] if dense is None else _row_chunks(W, None, chunk_of(W.device)):
            left, right = (N[:, rows], P.mT) if side == "right" else (P[:, rows], N)
            W[:, rows].baddbmm_(left, right, alpha=-lr * scale)
            if dense is not None:
                _subtract_phi_G_(W[:, rows], dense, rows, ok, usable, side, alpha=lr * scale)
        if sparse is not None:
            add_at_(W, *sparse, alpha=-lr * scale)
        return
    low = torch.bfloat16 if W.dtype == torch.bfloat16 and W.device.type in MULTIPLIES_BF16 else torch.float32
    N, P = N.to(low), P.to(low)
    for rows in _row_chunks(W, sparse[0] if sparse else None, CHUNK):  # bounds the memory of the float32 copies
        left, right = (N[:, rows], P) if side == "right" else (N, P[:, rows])
        U = lift(left, right, side)
        if dense is not None:
            U += _phi_G(dense, rows, ok, usable, side)
        new = W[:, rows].float() * (1.0 - ok * (lr * weight_decay)) - (lr * scale) * U
        if sparse is not None:
            support, values = sparse
            lines = rows if support.by_row(W.shape[-2]) else slice(None)
            add_at_(new, Support(support.positions[:, lines], support.columns), values[:, lines], alpha=-lr * scale)
        if generator is not None and W.dtype == torch.bfloat16:
            new = stochastic_round(new, generator)
        W[:, rows].copy_(new)


def _without_projected(N: Tensor, dense: Dense, ok: Tensor, usable: bool, side: str) -> Tensor:
    """N - phi R; 0 where the gradient is not usable."""
    rest = torch.addcmul(N, along_lines(dense.phi, side), dense.R, value=-1.0)
    return rest if usable else torch.where(ok > 0.0, rest, 0.0)


def _subtract_phi_G_(W: Tensor, dense: Dense, rows: slice, ok: Tensor, usable: bool, side: str, alpha: float) -> None:
    """W <- W - alpha phi G for some rows, in place; in one pass where no type changes and nothing is left out."""
    if dense.G.dtype == W.dtype and usable:
        phi = along_lines(dense.phi, side)
        W.addcmul_(phi[:, rows] if side == "right" else phi, dense.G[:, rows], value=-alpha)
    else:
        W.sub_(_phi_G(dense, rows, ok, usable, side), alpha=alpha)


def _phi_G(dense: Dense, rows: slice, ok: Tensor, usable: bool, side: str) -> Tensor:
    """phi G of some rows in the dtype of phi; 0 where the gradient is not usable."""
    phi = along_lines(dense.phi, side)
    product = dense.G[:, rows] * (phi[:, rows] if side == "right" else phi)
    return product if usable else torch.where(ok > 0.0, product, 0.0)


def _all_usable(ok: Tensor) -> bool:
    """Whether all gradients are usable, where reading that waits for no device; else False."""
    return type(ok) is Tensor and ok.device.type == "cpu" and all(flag > 0.0 for flag in ok.flatten().tolist())


def chunk_of(device: torch.device) -> int:
    """Entries of an intermediate result at a time: few enough for the cache of a CPU."""
    return CHUNK >> 4 if device.type == "cpu" else CHUNK


def _row_chunks(W: Tensor, support: Support | None, chunk: int) -> Iterator[slice]:
    """Slices of at most ``chunk`` entries; a global support needs one slice, since its positions span all rows."""
    blocks, m, n = W.shape
    size = m if support is not None and not support.by_row(m) else max(1, chunk // (blocks * n))
    return (slice(start, min(start + size, m)) for start in range(0, m, size))


def lift(N: Tensor, P: Tensor, side: str) -> Tensor:
    """N P^T (right) or P N (left): an update in the weight's shape, in ``compute_dtype``."""
    return matmul_wide(N, P.mT) if side == "right" else matmul_wide(P, N)


# ---------------------------------------------------------------------- moments at a refresh


def with_signs_of(P: Tensor, old: Tensor) -> Tensor:
    """P with each column's sign chosen to overlap positively with the old column (``momentum_transfer: align``)."""
    overlap = (old * P).sum(dim=-2, keepdim=True)
    return torch.where(overlap < 0.0, -P, P)


def rotate(
    M: Tensor, V: Tensor, t: Tensor, old: Tensor, P: Tensor, side: str, *, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Moments of age t in the new basis: M mapped by C = old^T P, V as in LDAdam (``momentum_transfer: rotate``)."""
    C = old.mT @ P  # r x r

    def mapped(A: Tensor, C: Tensor) -> Tensor:
        return A @ C if side == "right" else C.mT @ A

    t1 = t.to(M.dtype).clamp(min=1.0)  # as in ``adam``
    f1, f2 = decay_sum(betas[0], t1), decay_sum(betas[1], t1)
    Mh, Vh = M / f1, V / f2
    M = mapped(M, C)
    V = f2 * (mapped(Vh - Mh * Mh, C * C) + (M / f1) ** 2).abs()
    return M, V


# ---------------------------------------------------------------------- projection error


def error_from_norms(norm_G: Tensor, norm_R: Tensor) -> Tensor:
    """||G - lift(R)|| / ||G|| from the Frobenius norms of G and R alone, since the columns of P are orthonormal."""
    share = norm_R / norm_G.clamp(min=torch.finfo(torch.float32).tiny)
    return (1.0 - share * share).clamp(min=0.0).sqrt()


def lost_share(G: Tensor, P: Tensor, side: str, parts: int = 1) -> Tensor:
    """||G - lift(R)|| / ||G|| from the difference itself; ``error_from_norms`` cancels where the error is small.

    Args:
        G: [blocks, m, n].
        P, side: the basis and its side.
        parts: number of equal parts along the blocks.

    Returns:
        [parts], in ``compute_dtype``.
    """
    G = widen(G)
    D = G - lift(project(G, P, side), P, side)
    norm_D, norm_G = (torch.linalg.vector_norm(x.reshape(parts, -1), dim=1) for x in (D, G))
    return norm_D / norm_G.clamp(min=torch.finfo(torch.float32).tiny)


# ---------------------------------------------------------------------- precision


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a weight's state and arithmetic: float64 for float64 weights, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """A tensor in its ``compute_dtype``."""
    return x.to(compute_dtype(x.dtype))


def matmul_wide(A: Tensor, B: Tensor) -> Tensor:
    """A B in ``compute_dtype``, accumulated in it; bfloat16 factors are not widened where the device allows it."""
    if A.dtype == B.dtype and A.dtype in (torch.float32, torch.float64):
        return A @ B
    if A.device.type in MULTIPLIES_BF16 and A.dtype == torch.bfloat16:
        return torch.bmm(A, B.to(A.dtype), out_dtype=torch.float32)
    wide = compute_dtype(torch.promote_types(A.dtype, B.dtype))
    return A.to(wide) @ B.to(wide)


def largest_usable(dtype: torch.dtype) -> float:
    """The magnitude below which an entry's second moment, and sums of a few squares, stay finite.

    About 1e18 for float32 state. A larger gradient would make second moments infinite, and the next change of basis
    would turn infinities into NaN. Its step is skipped like that of a non-finite gradient.
    """
    return math.sqrt(torch.finfo(compute_dtype(dtype)).max) / 16.0


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down at random with an exact expectation."""
    return round_bits(x, torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32))


def round_bits(x: Tensor, noise: Tensor) -> Tensor:
    """``stochastic_round`` with given noise: int32, uniform in 0 ... 2^16 - 1.

    A bfloat16 is the upper half of a float32. Adding the noise carries into the upper half with probability
    (lower half) / 2^16; the lower half is then cut off. Infinities and NaN stay as they are.
    """
    rounded = ((x.contiguous().view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)
