"""The update of ``update.py`` at high ranks: a program moves one tile, and loops over the rank."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from galore_trainer.kernels.tables import ALIGNMENT, GOLDEN, moved, multiply, pointer_at, row_starts, unpacked

GROUP = 8  # rows of tiles whose programs run one after the other, so that they share what they read in the L2 cache


def described(N: Tensor, P: Tensor, side: str, rows: int, columns: int, depth: int) -> tuple[Any, Any] | None:
    """N and P as descriptors of tiles, which Hopper's copy engine reads; None where strides do not allow that.

    Args:
        N, P, side: as for ``apply_update_``.
        rows, columns, depth: of a tile of W, and of a product.
    """
    rank = P.shape[-1]
    ragged = side == "left" and rank % depth != 0  # the rows of N beyond the rank are those of the next matrix
    if ragged or any(x.shape[-1] * x.element_size() % ALIGNMENT != 0 for x in (N, P)):
        return None
    of_N, of_P = ((rows, depth), (columns, depth)) if side == "right" else ((depth, columns), (rows, depth))
    N, P = N.flatten(0, 1), P.flatten(0, 1)
    return TensorDescriptor.from_tensor(N, list(of_N)), TensorDescriptor.from_tensor(P, list(of_P))


@triton.jit
def apply_looped(
    weights,
    N,
    P,
    ok,
    keys,
    rows,
    columns,
    blocks,
    rates,
    gradients,
    phi,
    length,
    outer_stride,
    row_stride,
    column_stride,
    EVEN: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    G_length,
    G_outer_stride,
    G_row_stride,
    G_column_stride,
    G_EVEN: tl.constexpr,
    G_TYPE: tl.constexpr,
    G_ALIGNED: tl.constexpr,
    DENSE: tl.constexpr,
    RIGHT: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    DESCRIBED: tl.constexpr,
    TOGETHER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """A program moves one tile of one block.

    Arguments as for ``_apply_update``; ``TOGETHER`` is ``GROUP``, and N and P are what ``described`` returns if
    ``DESCRIBED``.
    """
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    block = tl.program_id(0) // (down * across)
    matrix = block // blocks
    if tl.load(ok + matrix) > 0.0:
        tile = tl.program_id(0) % (down * across)
        first_down = tile // (TOGETHER * across) * TOGETHER
        height = min(down - first_down, TOGETHER)
        tile_down = first_down + tile % (TOGETHER * across) % height
        tile_across = tile % (TOGETHER * across) // height
        i = tile_down * ROWS + tl.arange(0, ROWS)
        j = tile_across * COLUMNS + tl.arange(0, COLUMNS)
        row = block % blocks * rows + i
        mask = (i[:, None] < rows) & (j[None, :] < columns)
        start = pointer_at(weights, matrix, TYPE, ALIGNED) + row_starts(row, length, outer_stride, row_stride, EVEN)
        at = start[:, None] + (j.to(tl.int64) * column_stride)[None, :]
        if EARLY:
            w = tl.load(at, mask=mask, other=0.0)
        k = tl.arange(0, DEPTH)
        if not DESCRIBED:
            if RIGHT:
                left, right = N + block.to(tl.int64) * rows * RANK, P + block.to(tl.int64) * columns * RANK
                b_at = right + (j.to(tl.int64) * RANK)[None, :] + k[:, None]
                b_step = DEPTH
            else:
                left, right = P + block.to(tl.int64) * rows * RANK, N + block.to(tl.int64) * columns * RANK
                b_at = right + (k.to(tl.int64) * columns)[:, None] + j[None, :]
                b_step = DEPTH * columns
            a_at = left + (i.to(tl.int64) * RANK)[:, None] + k[None, :]
        lifted = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in tl.range(0, RANK, DEPTH, num_stages=STAGES):
            if DESCRIBED:  # beyond the tile's matrix they read the next one, for weights that the mask leaves out
                if RIGHT:
                    a = N.load([block * rows + tile_down * ROWS, first])
                    b = P.load([block * columns + tile_across * COLUMNS, first]).T
                else:
                    a = P.load([block * rows + tile_down * ROWS, first])
                    b = N.load([block * RANK + first, tile_across * COLUMNS])
            else:
                a_mask, b_mask = i[:, None] < rows, j[None, :] < columns
                if RANK % DEPTH != 0:
                    a_mask = a_mask & (k[None, :] < RANK - first)
                    b_mask = b_mask & (k[:, None] < RANK - first)
                a = tl.load(a_at, mask=a_mask, other=0.0)
                b = tl.load(b_at, mask=b_mask, other=0.0)
                a_at += DEPTH
                b_at += b_step
            lifted = multiply(a, b, lifted)
        if not EARLY:
            w = tl.load(at, mask=mask, other=0.0)
        if DENSE:
            G = pointer_at(gradients, matrix, G_TYPE, G_ALIGNED)
            g_start = G + row_starts(row, G_length, G_outer_stride, G_row_stride, G_EVEN)
            g = tl.load(g_start[:, None] + (j.to(tl.int64) * G_column_stride)[None, :], mask=mask, other=0.0)
            if RIGHT:
                factor = tl.load(phi + block.to(tl.int64) * rows + i, mask=i < rows, other=0.0)[:, None]
            else:
                factor = tl.load(phi + block.to(tl.int64) * columns + j, mask=j < columns, other=0.0)[None, :]
            lifted += factor * g.to(tl.float32)
        minus_step, decay = unpacked(rates, matrix)
        key, pair = 0, 0
        if STOCHASTIC:
            key = tl.load(keys + matrix)
            pair = (tile_across * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)).to(tl.uint32) * GOLDEN
        tl.store(at, moved(w, lifted, minus_step, decay, key, row, pair, TYPE, STOCHASTIC), mask=mask)
