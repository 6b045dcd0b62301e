"""D[S]: what the projection loses at a row-balanced support, without forming D."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels.tables import Layout, Scattered, pointer_at, row_starts

ENTRIES = 1 << 11  # products of a program in flight


def loss_at(
    G: Scattered, layout: Layout | None, positions: Scattered, R: Tensor, P: Tensor, side: str, blocks: int, count: int
) -> Tensor:
    """(G - lift(R))[S], float32 [jobs x blocks, rows, k].

    Args:
        G: gradients; or, without ``layout``, gradients at the support, float32, contiguous [blocks, rows, k].
        layout: of each gradient.
        positions: columns, int32 [blocks, rows, k], contiguous.
        R, P: as in ``core.galore``, [jobs x blocks, ...]; P in float32 or in bfloat16.
        side: ``right`` or ``left``.
        blocks: of equal height in each matrix.
        count: k.
    """
    left, right = (R, P) if side == "right" else (P, R.mT.contiguous())  # lift = left right^T: rows of both are read
    (total, rows, rank), columns = left.shape, right.shape[1]
    D = torch.empty(total, rows, count, dtype=torch.float32, device=R.device)
    width = triton.next_power_of_2(rank)
    if layout is None:
        layout = Layout(blocks * rows, count, blocks * rows, 0, count, 1)
        sampled = True
    else:
        sampled = False
    kernel: Any = _loss_at
    kernel[(total * rows,)](
        G.addresses, positions.addresses, left, right, D, rows, columns, blocks, count, **layout.strides, **G.pointer,
        INDEX_ALIGNED=positions.alignment, SAMPLED=sampled, RANK=rank, WIDTH=width,
        ENTRIES=max(1, min(32, ENTRIES // width)), num_warps=2,
    )  # fmt: skip
    return D


@triton.jit
def _loss_at(
    gradients, positions, left, right, D, rows, columns, blocks, count,
    length, outer_stride, row_stride, column_stride, EVEN: tl.constexpr,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, INDEX_ALIGNED: tl.constexpr, SAMPLED: tl.constexpr,
    RANK: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """A program makes one row of D[S]."""
    block, i = tl.program_id(0) // rows, tl.program_id(0) % rows
    job, row = block // blocks, block % blocks * rows + i
    k = tl.arange(0, WIDTH)
    a = tl.load(left + (block.to(tl.int64) * rows + i) * RANK + k, mask=k < RANK, other=0.0).to(tl.float32)
    right += block.to(tl.int64) * columns * RANK
    index = pointer_at(positions, job, tl.int32, INDEX_ALIGNED) + row.to(tl.int64) * count
    G = pointer_at(gradients, job, TYPE, ALIGNED) + row_starts(row, length, outer_stride, row_stride, EVEN)
    D += (block.to(tl.int64) * rows + i) * count
    for start in range(0, count, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        here = entry < count
        j = tl.load(index + entry, mask=here, other=0)
        b_at = right + j.to(tl.int64)[:, None] * RANK + k[None, :]
        b = tl.load(b_at, mask=here[:, None] & (k[None, :] < RANK), other=0.0).to(tl.float32)
        if SAMPLED:
            g = tl.load(G + entry, mask=here, other=0.0)
        else:
            g = tl.load(G + j.to(tl.int64) * column_stride, mask=here, other=0.0).to(tl.float32)
        tl.store(D + entry, g - tl.sum(a[None, :] * b, axis=1), mask=here)
