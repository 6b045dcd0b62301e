"""R = G P or P^T G for gradients at any address, and whether R is usable."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels import shared_memory
from galore_trainer.kernels.routes import route_of
from galore_trainer.kernels.tables import (
    Layout,
    Scattered,
    cdiv,
    multiply,
    next_power_of_2,
    pointer_at,
    rounded,
    row_starts,
)

ACCUMULATORS = 1 << 15  # most float32 entries of R in one program
MIN_PROGRAMS = 264  # two for every multiprocessor of an H100; fewer lines a program give more programs
JOIN_BLOCK = 2048  # entries that one program copies
NORM_LINES = {"right": 4, "left": 64}  # of a program of ``squared_norms``; neighbours lie next to each other (left)
NORM_DEPTH = {"right": 512, "left": 32}  # entries of each that it reads at a time
NEXT = tl.constexpr(8)  # entries of a line whose squares a thread adds up by itself


def join(tensors: Scattered, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Tensors as one tensor of another dtype, rounded to nearest.

    Args:
        tensors: contiguous.
        shape: of one of them.
        dtype: of the result.

    Returns:
        [matrices x shape[0], ...].
    """
    count = len(tensors.addresses)
    out = torch.empty(count * shape[0], *shape[1:], dtype=dtype, device=tensors.addresses.device)
    entries = out.numel() // count
    _join[(cdiv(entries, JOIN_BLOCK), count)](
        tensors.addresses, out, entries, **tensors.pointer, BLOCK=JOIN_BLOCK, num_warps=8
    )
    return out


@triton.jit
def _join(addresses, out, entries, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """A program copies ``BLOCK`` entries of one tensor."""
    matrix = tl.program_id(1)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(pointer_at(addresses, matrix, TYPE, ALIGNED) + entry, mask=entry < entries).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + matrix.to(tl.int64) * entries + entry, rounded(x, 0, dtype, False), mask=entry < entries)


def squared_norms(G: Scattered, layout: Layout, norms: Tensor, side: str, blocks: int) -> None:
    """Write the squared norms of the lines of gradients; see ``project``."""
    (total, lines), rows, right = norms.shape, layout.rows // blocks, side == "right"
    tall = NORM_LINES[side]
    kernel: Any = _squared_norms
    kernel[(total * cdiv(lines, tall),)](
        G.addresses,
        norms,
        rows,
        lines,
        layout.columns if right else rows,
        blocks,
        **layout.strides,
        **G.pointer,
        RIGHT=right,
        LINES=tall,
        DEPTH=NORM_DEPTH[side],
        num_warps=4,
    )


@triton.jit
def _squared_norms(
    gradients,
    norms,
    rows,
    lines,
    inner,
    blocks,
    length,
    outer_stride,
    row_stride,
    column_stride,
    EVEN: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    RIGHT: tl.constexpr,
    LINES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A program adds up ``LINES`` rows (right) or columns (left) of one block, ``DEPTH`` entries of each at a time."""
    tiles = tl.cdiv(lines, LINES)
    block = tl.program_id(0) // tiles
    first = block % blocks * rows
    G = pointer_at(gradients, block // blocks, TYPE, ALIGNED)
    line = tl.program_id(0) % tiles * LINES + tl.arange(0, LINES)
    k = tl.arange(0, DEPTH)
    if RIGHT:  # tiles [LINES, DEPTH], read along rows
        rows_at = row_starts(first + line, length, outer_stride, row_stride, EVEN)
        at = G + rows_at[:, None] + (k * column_stride)[None, :]
        total = tl.zeros((LINES, DEPTH), tl.float32)
        for start in range(0, inner, DEPTH):
            g = tl.load(at, mask=(line[:, None] < lines) & (k[None, :] < inner - start), other=0.0).to(tl.float32)
            total += g * g
            at += DEPTH * column_stride
        of_line = tl.sum(total, axis=1)
    else:  # tiles [DEPTH, LINES]
        total = tl.zeros((DEPTH, LINES), tl.float32)
        across = (line.to(tl.int64) * column_stride)[None, :]
        for start in range(0, inner, DEPTH):
            rows_at = row_starts(first + start + k, length, outer_stride, row_stride, EVEN)
            mask = (k[:, None] < inner - start) & (line[None, :] < lines)
            g = tl.load(G + rows_at[:, None] + across, mask=mask, other=0.0).to(tl.float32)
            total += g * g
        of_line = tl.sum(total, axis=0)
    tl.store(norms + block.to(tl.int64) * lines + line, of_line, mask=line < lines)


def project(
    G: Scattered,
    layout: Layout,
    P: Tensor,
    side: str,
    blocks: int,
    limit: float = math.inf,
    norms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Projected gradients, and whether they can enter the moments.

    Args:
        G: gradients, float32 or bfloat16.
        layout: of a logical matrix in its gradient.
        P: [matrices x blocks, n, r] (right) or [matrices x blocks, rows, r] (left), in the dtype of G or in bfloat16,
            to which float32 gradients are then rounded.
        side: ``right`` or ``left``.
        blocks: number of blocks of a matrix.
        limit: magnitude from which an entry of R is not usable (``core.galore.largest_usable``).
        norms: takes the squared norms of the lines of G, float32 [matrices x blocks, lines]; None where not wanted.
            They are of G as it is stored, and a matrix has the same bits alone as among others.

    Returns:
        R, float32 [matrices x blocks, rows, r] (right) or [matrices x blocks, r, n] (left), and 1.0 where all of R is
        usable, else 0.0, [matrices].
    """
    (total, inner, rank), rows = P.shape, layout.rows // blocks
    right, single = side == "right", P.dtype == torch.float32
    lines = rows if right else layout.columns
    R = torch.empty((total, lines, rank) if right else (total, rank, lines), dtype=torch.float32, device=P.device)
    ok = torch.ones(len(G.addresses), dtype=torch.float32, device=P.device)
    route = route_of(rank, P.dtype).project
    width = max(16, next_power_of_2(min(rank, route.columns)))
    across = cdiv(rank, width)
    tall = max(16, min(route.lines, ACCUMULATORS // (2 if single else 1) // width))
    if norms is not None and not route.norms:
        squared_norms(G, layout, norms, side, blocks)
        norms = None
    # A tile fixes the order of the sums in norms: there the number of matrices must not change it.
    while norms is None and tall > 64 and total * cdiv(lines, tall) * across < MIN_PROGRAMS:
        tall //= 2
    deep = 16 if single else max(16, min(64, 16384 // width))
    stages = shared_memory(P.device) // (deep * (tall * G.dtype.itemsize + width * P.element_size()))
    kernel: Any = _project
    kernel[(total * cdiv(lines, tall) * across,)](
        G.addresses,
        P,
        R,
        ok,
        ok if norms is None else norms,  # a pointer that is not read
        rows,
        lines,
        inner,
        blocks,
        limit,
        **layout.strides,
        **G.pointer,
        RIGHT=right,
        RANK=rank,
        LINES=tall,
        DEPTH=deep,
        WIDTH=width,
        ACROSS=across,
        NORMS=norms is not None,
        num_warps=8 if single or tall * width > 16384 else 4,
        num_stages=max(1, min(3, stages)),
    )
    return R, ok


@triton.jit
def _project(
    gradients,
    P,
    R,
    ok,
    norms,
    rows,
    lines,
    inner,
    blocks,
    limit,
    length,
    outer_stride,
    row_stride,
    column_stride,
    EVEN: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    RIGHT: tl.constexpr,
    RANK: tl.constexpr,
    LINES: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ACROSS: tl.constexpr,
    NORMS: tl.constexpr,
):
    """A program computes ``WIDTH`` entries of ``LINES`` rows (right) or columns (left) of R: sums over ``inner`` of G.

    The next of ``ACROSS`` programs computes the next entries of the same lines, so that G comes from the L2 cache.
    """
    tiles = tl.cdiv(lines, LINES)
    program, part = tl.program_id(0) // ACROSS, tl.program_id(0) % ACROSS
    block = program // tiles
    matrix, first = block // blocks, block % blocks * rows
    G = pointer_at(gradients, matrix, TYPE, ALIGNED)
    P += block.to(tl.int64) * inner * RANK
    R += block.to(tl.int64) * lines * RANK
    line = program % tiles * LINES + tl.arange(0, LINES)
    column = part * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((LINES, WIDTH), tl.float32)
    if NORMS:
        of_line = tl.zeros((LINES, DEPTH // NEXT), tl.float32)
    k = tl.arange(0, DEPTH)
    if RIGHT:
        rows_at = row_starts(first + line, length, outer_stride, row_stride, EVEN)
        at = G + rows_at[:, None] + (k * column_stride)[None, :]
    else:
        at = G + (line.to(tl.int64) * column_stride)[:, None]
    p_at = P + k[:, None] * RANK + column[None, :]
    for start in range(0, inner, DEPTH):
        inside = k < inner - start
        mask = (line[:, None] < lines) & inside[None, :]
        if RIGHT:
            g_at = at
            at += DEPTH * column_stride
        else:
            g_at = at + row_starts(first + start + k, length, outer_stride, row_stride, EVEN)[None, :]
        g = tl.load(g_at, mask=mask, other=0.0)
        if NORMS:
            # Tensor cores read bfloat16 tiles from shared memory. Norms need them in registers: a load of their own
            # gets them from the L2 cache. (Triton 3.6 overwrites the tile too early where one load serves both.)
            x = g
            if tl.bfloat16 == TYPE:
                x = tl.load(g_at, mask=mask, other=0.0, cache_modifier=".ca").to(tl.float32)
            if RIGHT:  # in the order in which a thread holds them
                of_line += tl.sum(tl.reshape(x * x, (LINES, DEPTH // NEXT, NEXT)), axis=2)
            else:
                of_line += tl.sum(tl.reshape(x * x, (LINES, NEXT, DEPTH // NEXT)), axis=1)
        p = tl.load(p_at, mask=inside[:, None] & (column[None, :] < RANK), other=0.0)
        p_at += DEPTH * RANK
        if g.dtype != p.dtype:
            g = rounded(g, 0, p.dtype, False)
        total = multiply(g, p, total)
    mask = (line[:, None] < lines) & (column[None, :] < RANK)
    if RIGHT:
        out = R + line.to(tl.int64)[:, None] * RANK + column[None, :]
    else:
        out = R + column.to(tl.int64)[None, :] * lines + line[:, None]
    tl.store(out, total, mask=mask)
    if NORMS:
        tl.store(norms + block.to(tl.int64) * lines + line, tl.sum(of_line, axis=1), mask=line < lines)
    usable = tl.min(tl.min((tl.abs(total) < limit).to(tl.int32), axis=1), axis=0)  # 0 for NaN, too
    tl.store(ok + matrix, 0.0, mask=usable == 0)
