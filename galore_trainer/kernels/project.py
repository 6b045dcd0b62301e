"""R = G P or P^T G for gradients that lie anywhere, and whether moments can take it in."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels import shared_memory
from galore_trainer.kernels.tables import Layout, Scattered, multiply, pointer_at, rounded, row_starts

ACCUMULATORS = 1 << 15  # float32 entries of R that one program holds
WIDEST = 128  # lines of R in a program, where there are enough programs
ENOUGH = 264  # programs: two for each multiprocessor of an H100


def join(tensors: Scattered, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Contiguous tensors one after the other in another dtype, rounded to nearest: [count x shape[0], ...]."""
    count = len(tensors.addresses)
    out = torch.empty(count * shape[0], *shape[1:], dtype=dtype, device=tensors.addresses.device)
    entries = out.numel() // count
    _join[(triton.cdiv(entries, 2048), count)](
        tensors.addresses, out, entries, **tensors.pointer, BLOCK=2048, num_warps=8
    )
    return out


@triton.jit
def _join(addresses, out, entries, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    job = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(pointer_at(addresses, job, TYPE, ALIGNED) + at, mask=at < entries).to(tl.float32)
    to: tl.constexpr = out.dtype.element_ty
    tl.store(out + job.to(tl.int64) * entries + at, rounded(x, 0, to, False), mask=at < entries)


def project(
    G: Scattered, layout: Layout, P: Tensor, side: str, blocks: int, limit: float = math.inf
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Projected gradients, and where moments can take them in.

    Args:
        G: gradients, float32 or bfloat16.
        layout: of each.
        P: [jobs x blocks, n or rows, r], in the dtype of the gradients; or in bfloat16, which float32 gradients are
            rounded to before they are multiplied.
        side: ``right`` or ``left``.
        blocks: of equal height in each matrix.
        limit: magnitude that moments cannot take in.

    Returns:
        R, float32 [jobs x blocks, rows, r] or [jobs x blocks, r, n], and 1.0 or 0.0 for each job, [jobs].
    """
    (total, inner, rank), rows = P.shape, layout.rows // blocks
    right, single = side == "right", P.dtype == torch.float32
    lines = rows if right else layout.columns
    R = torch.empty((total, lines, rank) if right else (total, rank, lines), dtype=torch.float32, device=P.device)
    ok = torch.ones(len(G.addresses), dtype=torch.float32, device=P.device)
    width = max(16, triton.next_power_of_2(rank))
    tall = max(16, min(WIDEST, ACCUMULATORS // (2 if single else 1) // width))
    while tall > 64 and total * triton.cdiv(lines, tall) < ENOUGH:
        tall //= 2
    deep = 16 if single else max(16, min(64, 16384 // width))
    stages = shared_memory(P.device) // (deep * (tall * G.dtype.itemsize + width * P.element_size()))
    kernel: Any = _project
    kernel[(total * triton.cdiv(lines, tall),)](
        G.addresses, P, R, ok, rows, lines, inner, blocks, limit, **layout.strides, **G.pointer, RIGHT=right, RANK=rank,
        LINES=tall, DEPTH=deep, WIDTH=width,
        num_warps=8 if single or tall * width > 16384 else 4, num_stages=max(1, min(3, stages)),
    )  # fmt: skip
    return R, ok


@triton.jit
def _project(
    gradients, P, R, ok, rows, lines, inner, blocks, limit,
    length, outer_stride, row_stride, column_stride, EVEN: tl.constexpr,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, RIGHT: tl.constexpr, RANK: tl.constexpr,
    LINES: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program makes some lines of R (rows, or columns on the left) from ``inner`` entries each."""
    tiles = tl.cdiv(lines, LINES)
    block = tl.program_id(0) // tiles
    job, first = block // blocks, block % blocks * rows
    G = pointer_at(gradients, job, TYPE, ALIGNED)
    P += block.to(tl.int64) * inner * RANK
    R += block.to(tl.int64) * lines * RANK
    line = tl.program_id(0) % tiles * LINES + tl.arange(0, LINES)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((LINES, WIDTH), tl.float32)
    k = tl.arange(0, DEPTH)
    if RIGHT:
        rows_at = row_starts(first + line, length, outer_stride, row_stride, EVEN)
        at = G + rows_at[:, None] + (k * column_stride)[None, :]
    else:
        at = G + (line.to(tl.int64) * column_stride)[:, None]
    p_at = P + k[:, None] * RANK + column[None, :]
    for start in range(0, inner, DEPTH):
        inside = k < inner - start
        if RIGHT:
            g = tl.load(at, mask=(line[:, None] < lines) & inside[None, :], other=0.0)
            at += DEPTH * column_stride
        else:
            rows_at = row_starts(first + start + k, length, outer_stride, row_stride, EVEN)
            g = tl.load(at + rows_at[None, :], mask=(line[:, None] < lines) & inside[None, :], other=0.0)
        p = tl.load(p_at, mask=inside[:, None] & (column[None, :] < RANK), other=0.0)
        p_at += DEPTH * RANK
        if g.dtype != p.dtype:
            g = rounded(g, 0, p.dtype, False)
        total = multiply(g, p, total)
    here = (line[:, None] < lines) & (column[None, :] < RANK)
    if RIGHT:
        out = R + line.to(tl.int64)[:, None] * RANK + column[None, :]
    else:
        out = R + column.to(tl.int64)[None, :] * lines + line[:, None]
    tl.store(out, total, mask=here)
    usable = tl.min(tl.min((tl.abs(total) < limit).to(tl.int32), axis=1), axis=0)
    tl.store(ok + job, 0.0, mask=usable == 0)
