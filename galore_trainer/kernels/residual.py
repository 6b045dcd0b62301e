"""D[S], what the projection loses at a row-balanced support, without forming D."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels.tables import Layout, Scattered, next_power_of_2, pointer_at, row_starts

PRODUCTS = 1 << 11  # products that a program computes at a time


def loss_at(
    G: Scattered, layout: Layout | None, positions: Scattered, R: Tensor, P: Tensor, side: str, blocks: int, count: int
) -> Tensor:
    """D[S] = (G - lift(R))[S], as ``core.residual.lost_at``.

    Args:
        G: gradients; where ``layout`` is None G[S] instead, float32, contiguous [blocks, rows, k].
        layout: of a logical matrix in its gradient, or None.
        positions: S as columns, int32 [blocks, rows, k], contiguous.
        R, P: [matrices x blocks, ...] as in ``core.galore``; P in float32 or bfloat16.
        side: ``right`` or ``left``.
        blocks: number of blocks of a matrix.
        count: k.

    Returns:
        float32 [matrices x blocks, rows, k].
    """
    left, right = (R, P) if side == "right" else (P, R.mT.contiguous())  # lift = left right^T; contiguous rows
    (total, rows, rank), columns = left.shape, right.shape[1]
    D = torch.empty(total, rows, count, dtype=torch.float32, device=R.device)
    width = next_power_of_2(rank)
    sampled = layout is None
    if layout is None:
        layout = Layout(blocks * rows, count, blocks * rows, 0, count, 1)
    kernel: Any = _loss_at
    kernel[(total * rows,)](
        G.addresses,
        positions.addresses,
        left,
        right,
        D,
        rows,
        columns,
        blocks,
        count,
        **layout.strides,
        **G.pointer,
        INDEX_ALIGNED=positions.alignment,
        SAMPLED=sampled,
        RANK=rank,
        WIDTH=width,
        ENTRIES=max(1, min(32, PRODUCTS // width)),
        num_warps=2,
    )
    return D


@triton.jit
def _loss_at(
    gradients,
    positions,
    left,
    right,
    D,
    rows,
    columns,
    blocks,
    count,
    length,
    outer_stride,
    row_stride,
    column_stride,
    EVEN: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INDEX_ALIGNED: tl.constexpr,
    SAMPLED: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """A program computes one row of D[S], ``ENTRIES`` entries at a time."""
    block, i = tl.program_id(0) // rows, tl.program_id(0) % rows
    matrix, row = block // blocks, block % blocks * rows + i
    k = tl.arange(0, WIDTH)
    a = tl.load(left + (block.to(tl.int64) * rows + i) * RANK + k, mask=k < RANK, other=0.0).to(tl.float32)
    right += block.to(tl.int64) * columns * RANK
    index = pointer_at(positions, matrix, tl.int32, INDEX_ALIGNED) + row.to(tl.int64) * count
    G = pointer_at(gradients, matrix, TYPE, ALIGNED) + row_starts(row, length, outer_stride, row_stride, EVEN)
    D += (block.to(tl.int64) * rows + i) * count
    for start in range(0, count, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        mask = entry < count
        j = tl.load(index + entry, mask=mask, other=0)
        b_at = right + j.to(tl.int64)[:, None] * RANK + k[None, :]
        b = tl.load(b_at, mask=mask[:, None] & (k[None, :] < RANK), other=0.0).to(tl.float32)
        if SAMPLED:
            g = tl.load(G + entry, mask=mask, other=0.0)
        else:
            g = tl.load(G + j.to(tl.int64) * column_stride, mask=mask, other=0.0).to(tl.float32)
        tl.store(D + entry, g - tl.sum(a[None, :] * b, axis=1), mask=mask)
