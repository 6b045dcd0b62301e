"""The dense scaled residual (``core.scaled``): factors phi of a gradient's lines, and N - phi R.

A line is a row of G (right) or a column of a block (left). Tiles follow from a matrix's shape alone, so that a matrix
has the same bits alone as among others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels.adam import clipped, lerp, log_of, normalised
from galore_trainer.kernels.tables import Scattered, cdiv, next_power_of_2, pointer_at, rounded

TILE = 2048  # entries of R that a program takes at a time
MAX_DEPTH = 128  # most of them along a line (right)
LINES = 128  # lines of a program (left), which are contiguous there
BLOCK = 2048  # entries of N - phi R in a program


class Moments(NamedTuple):
    """Moments and what ``adam_`` does with them.

    Attributes:
        M, V, t, betas, eps: as for ``adam_``.
    """

    M: Scattered
    V: Scattered
    t: Scattered
    betas: tuple[float, float]
    eps: float


def line_factors(
    R: Tensor,
    N: Tensor,
    norms: Tensor,
    ok: Tensor,
    blocks: int,
    side: str,
    *,
    residual_scale: float,
    noise: float,
    moments: Moments | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """phi before its limit, and d^2 of every line; see ``core.scaled.line_factors``.

    Args:
        R: projected gradients, float32 [matrices x blocks, lines, r] (right) or [matrices x blocks, r, lines] (left).
        N: normalised updates in the shape of R, float32.
        norms: ||G_j||^2, float32 [matrices x blocks, lines].
        ok: [matrices], 1.0 or 0.0. Where it is 0.0 both results are 0, whatever R, N and the norms are.
        blocks: number of blocks of a matrix.
        side: ``right`` or ``left``.
        residual_scale, noise: as in ``core``.
        moments: to take R in, in place: N is written, as by ``adam_``, and not read. So R is read once for both.
        clip: float32 scalar that multiplies R where moments take it in; None is 1. Both results are for gradients and
            projections as they are; they are 0 where it is 0.

    Returns:
        phi, float32 [matrices x blocks, lines]; (phi_j ||D_j||)^2 in float64 and in the same shape.
    """
    right = side == "right"
    total, lines = norms.shape
    rank = R.shape[-1 if right else -2]
    phi, lost = torch.empty_like(norms), torch.empty_like(norms, dtype=torch.float64)
    depth = min(next_power_of_2(rank), MAX_DEPTH if right else TILE // LINES)
    tall = TILE // depth if right else LINES
    kernel: Any = _line_factors
    kernel[(total * cdiv(lines, tall),)](
        R,
        N,
        norms,
        ok,
        clip,
        phi,
        lost,
        lines,
        blocks,
        residual_scale,
        noise * noise,
        **_of_moments(moments),
        RIGHT=right,
        RANK=rank,
        LINES=tall,
        DEPTH=depth,
        num_warps=8,
    )
    return phi, lost


def _of_moments(moments: Moments | None) -> dict[str, object]:
    """Keyword arguments of the kernel; None without moments, so that nothing of them is compiled."""
    if moments is None:
        return dict.fromkeys(("M", "V", "t", "rate1", "rate2", "log_beta1", "log_beta2", "eps", "ALIGNED"))
    M, V, t, (b1, b2), eps = moments
    return {
        "M": M.addresses,
        "V": V.addresses,
        "t": t.addresses,
        "rate1": 1.0 - b1,
        "rate2": 1.0 - b2,
        "log_beta1": log_of(b1),
        "log_beta2": log_of(b2),
        "eps": eps,
        "ALIGNED": min(M.alignment, V.alignment),
    }


@triton.jit
def _line_factors(
    R,
    N,
    norms,
    ok,
    clip,
    phi,
    lost,
    lines,
    blocks,
    residual_scale,
    noise2,
    M,
    V,
    t,
    rate1,
    rate2,
    log_beta1,
    log_beta2,
    eps,
    ALIGNED: tl.constexpr,
    RIGHT: tl.constexpr,
    RANK: tl.constexpr,
    LINES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A program takes ``LINES`` lines of one block, and makes N of the moments unless M is None."""
    tiles = tl.cdiv(lines, LINES)
    block = tl.program_id(0) // tiles
    matrix = block // blocks
    line = tl.program_id(0) % tiles * LINES + tl.arange(0, LINES)
    by_line = block.to(tl.int64) * lines + line
    factor = tl.zeros((LINES,), tl.float32)
    square = tl.zeros((LINES,), tl.float64)
    if tl.load(ok + matrix) > 0.0:
        R += block.to(tl.int64) * lines * RANK
        N += block.to(tl.int64) * lines * RANK
        if M is not None:
            within = (block % blocks).to(tl.int64) * lines * RANK
            M_block = pointer_at(M, matrix, tl.float32, ALIGNED) + within
            V_block = pointer_at(V, matrix, tl.float32, ALIGNED) + within
            age = tl.load(pointer_at(t, matrix, tl.float32, 4)) + 1.0
        rr = tl.zeros((LINES, DEPTH), tl.float32)
        nn = tl.zeros((LINES, DEPTH), tl.float32)
        for start in range(0, RANK, DEPTH):
            k = start + tl.arange(0, DEPTH)
            mask = (line[:, None] < lines) & (k[None, :] < RANK)
            if RIGHT:
                at = line.to(tl.int64)[:, None] * RANK + k[None, :]
            else:
                at = k.to(tl.int64)[None, :] * lines + line[:, None]
            r = tl.load(R + at, mask=mask, other=0.0)
            if M is not None:
                g = clipped(r, clip)
                m = lerp(tl.load(M_block + at, mask=mask, other=0.0), g, rate1)
                v = lerp(tl.load(V_block + at, mask=mask, other=0.0), g * g, rate2)
                tl.store(M_block + at, m, mask=mask)
                tl.store(V_block + at, v, mask=mask)
                n = normalised(m, v, age, log_beta1, log_beta2, eps)
                tl.store(N + at, n, mask=mask)
            else:
                n = tl.load(N + at, mask=mask, other=0.0).to(tl.float32)
            rr += r * r
            nn += n * n
        r2, n2 = tl.sum(rr, axis=1), tl.sum(nn, axis=1)
        g2 = tl.load(norms + by_line, mask=line < lines, other=0.0)
        if clip is not None:
            r2 = tl.where(tl.load(clip) > 0.0, r2, 0.0)
        is_seen = (r2 > 0.0) & (r2 > noise2 * g2)
        factor = tl.where(is_seen, residual_scale * tl.sqrt(n2) / tl.sqrt(tl.where(is_seen, r2, 1.0)), 0.0)
        wide = factor.to(tl.float64)
        rest = g2.to(tl.float64) - r2.to(tl.float64)
        square = tl.where(is_seen & (rest > 0.0), wide * wide * rest, 0.0)
    tl.store(phi + by_line, factor, mask=line < lines)
    tl.store(lost + by_line, square, mask=line < lines)


def limit_growth_(lost: Tensor, phi: Tensor, before: Scattered, growth: float) -> None:
    """``core.scaled.limit``, in place: limits phi, and writes what is moved now over what was moved before.

    Args:
        lost: (phi_j ||D_j||)^2 of every line, float64 [matrices x blocks, lines].
        phi: of the same lines, float32.
        before: ||phi D|| of the step before, float32 scalars, one a matrix.
        growth: most that ||phi D|| grows by in a step.
    """
    matrices = len(before.addresses)
    kernel: Any = _limit_growth
    kernel[(matrices,)](before.addresses, lost, phi, phi.numel() // matrices, GROWTH=growth, BLOCK=BLOCK, num_warps=8)


@triton.jit
def _limit_growth(before, lost, phi, lines, GROWTH: tl.constexpr, BLOCK: tl.constexpr):
    """A program limits one matrix."""
    matrix = tl.program_id(0)
    lost += matrix.to(tl.int64) * lines
    phi += matrix.to(tl.int64) * lines
    line = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, lines, BLOCK):
        squares += tl.load(lost + start + line, mask=line < lines - start, other=0.0)
    size = tl.sqrt(tl.sum(squares, axis=0))
    at = pointer_at(before, matrix, tl.float32, 4)
    last = tl.load(at)
    most = tl.where(last > 0.0, GROWTH * last.to(tl.float64), float("inf"))
    if size > most:
        factor = most / size
        for start in range(0, lines, BLOCK):
            old = tl.load(phi + start + line, mask=line < lines - start, other=0.0)
            tl.store(phi + start + line, (old.to(tl.float64) * factor).to(tl.float32), mask=line < lines - start)
    tl.store(at, tl.where(size > 0.0, tl.minimum(size, most).to(tl.float32), last))


def without_projected(N: Tensor, R: Tensor, phi: Tensor, ok: Tensor, side: str, dtype: torch.dtype) -> Tensor:
    """N - phi R, rounded once.

    Args:
        N, R: float32, as above.
        phi: [matrices x blocks, lines], limited.
        ok: [matrices]. Where it is 0.0 the entries of the result are left undefined.
        side: ``right`` or ``left``.
        dtype: of the result.
    """
    out = torch.empty_like(N, dtype=dtype)
    total, lines = phi.shape
    entries = R.numel() // total
    kernel: Any = _without_projected
    kernel[(cdiv(entries, BLOCK), total)](
        N,
        R,
        phi,
        ok,
        out,
        entries,
        lines,
        R.shape[-1 if side == "right" else -2],
        total // len(ok),
        RIGHT=side == "right",
        BLOCK=BLOCK,
        num_warps=8,
    )
    return out


@triton.jit
def _without_projected(N, R, phi, ok, out, entries, lines, rank, blocks, RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """A program computes ``BLOCK`` entries of one block."""
    block = tl.program_id(1)
    if tl.load(ok + block // blocks) > 0.0:
        entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = entry < entries
        line = entry // rank if RIGHT else entry % lines
        at = block.to(tl.int64) * entries + entry
        factor = tl.load(phi + block.to(tl.int64) * lines + line, mask=mask, other=0.0)
        new = tl.load(N + at, mask=mask, other=0.0) - factor * tl.load(R + at, mask=mask, other=0.0)
        dtype: tl.constexpr = out.dtype.element_ty
        tl.store(out + at, rounded(new, 0, dtype, False), mask=mask)
