"""Factors of the dense scaled residual for every line of a gradient (``core.scaled``), and N - phi R."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels.tables import rounded

ENTRIES = 8192  # of R and of N that a program reads at a time
MIN_LINES = 16  # fewest lines of a program; on the left they follow one another in memory
MAX_WIDTH = 256  # most entries of a line that a program reads at a time
BLOCK = 2048  # entries of N - phi R in a program


def line_factors(
    R: Tensor, N: Tensor, norms: Tensor, ok: Tensor, blocks: int, side: str, *, residual_scale: float, noise: float
) -> tuple[Tensor, Tensor]:
    """phi before its limit, and d^2 of every line; see ``core.scaled.line_factors``.

    Args:
        R: projected gradients, float32 [matrices x blocks, lines, r] (right) or [matrices x blocks, r, lines] (left).
        N: normalised updates in the shape of R, float32.
        norms: ||G_j||^2, float32 [matrices x blocks, lines].
        ok: [matrices], 1.0 or 0.0. Where it is 0.0 both results are 0.
        blocks: number of blocks of a matrix.
        side: ``right`` or ``left``.
        residual_scale, noise: as in ``core``.

    Returns:
        phi, float32 [matrices x blocks, lines]; (phi_j ||D_j||)^2 in float64 and in the same shape.
    """
    total, lines = norms.shape
    right = side == "right"
    rank = R.shape[-1 if right else -2]
    width = min(MAX_WIDTH, triton.next_power_of_2(rank))
    tall = max(MIN_LINES, ENTRIES // width)
    phi, lost = torch.empty_like(norms), torch.empty_like(norms, dtype=torch.float64)
    kernel: Any = _line_factors
    kernel[(triton.cdiv(lines, tall), total)](
        R,
        N,
        norms,
        ok,
        phi,
        lost,
        lines,
        rank,
        blocks,
        residual_scale,
        noise * noise,
        RIGHT=right,
        LINES=tall,
        WIDTH=width,
        num_warps=8,
    )
    return phi, lost


@triton.jit
def _line_factors(
    R,
    N,
    norms,
    ok,
    phi,
    lost,
    lines,
    rank,
    blocks,
    residual_scale,
    noise,
    RIGHT: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program reads ``LINES`` lines of one block."""
    block = tl.program_id(1)
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    inside = line < lines
    begin = block.to(tl.int64) * lines * rank
    of_R = tl.zeros((LINES,), tl.float32)
    of_N = tl.zeros((LINES,), tl.float32)
    for first in range(0, rank, WIDTH):
        k = first + tl.arange(0, WIDTH)
        if RIGHT:
            at = begin + line.to(tl.int64)[:, None] * rank + k[None, :]
        else:
            at = begin + k.to(tl.int64)[None, :] * lines + line[:, None]
        mask = inside[:, None] & (k[None, :] < rank)
        r = tl.load(R + at, mask=mask, other=0.0)
        n = tl.load(N + at, mask=mask, other=0.0)
        of_R += tl.sum(r * r, axis=1)
        of_N += tl.sum(n * n, axis=1)
    at = block.to(tl.int64) * lines + line
    of_G = tl.load(norms + at, mask=inside, other=0.0)
    least = tl.where(tl.load(ok + block // blocks) > 0.0, noise * of_G, float("inf"))
    seen = of_R > least  # False for NaN, too
    factor = tl.where(seen, residual_scale * tl.sqrt(of_N / of_R), 0.0)
    rest = tl.where(seen, tl.maximum(of_G.to(tl.float64) - of_R.to(tl.float64), 0.0), 0.0)
    tl.store(phi + at, factor, mask=inside)
    tl.store(lost + at, factor.to(tl.float64) * factor.to(tl.float64) * rest, mask=inside)


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
    kernel[(triton.cdiv(entries, BLOCK), total)](
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
