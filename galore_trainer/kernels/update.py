"""W <- W - lr wd W - lr scale (lift(N) + N_S at S), in place, where the weights lie."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels import in_groups, shared_memory
from galore_trainer.kernels.tables import Layout, Scattered, mixed, multiply, pointer_at, rounded, row_keys, row_starts

WARPS = 4  # move a tile
TILES = 16  # one below the other, of one program: it loads two while it multiplies for a third
SPARSE_KEY = 0x5851F42D4C957F2D  # tells the noise of the sparse entries from that of the whole weight


def apply_update_(
    W: Scattered, layout: Layout, N: Tensor, P: Tensor, side: str, ok: Tensor, blocks: int, *,
    step: float, decay: float, keys: Tensor | None,
) -> None:  # fmt: skip
    """W <- W (1 - decay) - step lift(N), not at all where ``ok`` is 0.

    Args:
        W: weights, float32 or bfloat16.
        layout: of each.
        N, P: [jobs x blocks, ...] as in ``core.galore``, in the dtype of the weights, or bfloat16.
        side: ``right`` or ``left``.
        ok: 1.0 or 0.0 for each job, [jobs].
        blocks: of equal height in each matrix.
        step, decay: lr x scale, lr x weight decay.
        keys: int64 [jobs], round bfloat16 weights stochastically; None rounds to nearest.
    """
    total, rank = len(P), P.shape[-1]
    rows, columns = layout.rows // blocks, layout.columns
    width, entry = max(16, triton.next_power_of_2(rank)), N.element_size()
    tall, wide, depth = _tile(N, width)
    kept = depth * wide * entry  # bytes, for all tiles; and for each:
    loaded = (tall * width + (width - depth) * wide) * entry + tall * wide * W.dtype.itemsize
    stages = (shared_memory(N.device) - kept) // loaded
    tiles = min(TILES, triton.cdiv(rows, tall))
    programs = triton.cdiv(rows, tall * tiles) * triton.cdiv(columns, wide)
    kernel: Any = _apply_update
    kernel[(total * programs,)](
        W.addresses, N, P, ok, ok if keys is None else keys, rows, columns, blocks, step, decay,
        **layout.strides, **W.pointer, RIGHT=side == "right", RANK=rank, ROWS=tall, COLUMNS=wide, TILES=tiles,
        DEPTH=depth, STAGES=max(1, min(3, stages)), STOCHASTIC=keys is not None,
        num_warps=WARPS,
    )  # fmt: skip


def _tile(N: Tensor, width: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and how many terms of the product it takes at a time."""
    if N.dtype == torch.bfloat16:
        return 32, 128, min(width, 128)
    if not in_groups(N.device):  # larger ones, in three parts, do not fit into registers
        return 32, 64, min(width, 64)
    return 64, 64, width if width <= 128 else 64


@triton.jit
def _apply_update(
    weights, N, P, ok, keys, rows, columns, blocks, step, decay,
    length, outer_stride, row_stride, column_stride, EVEN: tl.constexpr,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, RIGHT: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """A program moves some tiles below each other of one block; the next program those on their right."""
    program, across = tl.program_id(0), tl.cdiv(columns, COLUMNS)
    programs = tl.cdiv(rows, ROWS * TILES) * across
    block = program // programs
    job = block // blocks
    if tl.load(ok + job) > 0.0:
        j = program % across * COLUMNS + tl.arange(0, COLUMNS)
        k = tl.arange(0, DEPTH)
        W = pointer_at(weights, job, TYPE, ALIGNED)
        if RIGHT:
            left, right = N + block.to(tl.int64) * rows * RANK, P + block.to(tl.int64) * columns * RANK
            b_at = right + (j.to(tl.int64) * RANK)[None, :] + k[:, None]
            further = DEPTH
        else:
            left, right = P + block.to(tl.int64) * rows * RANK, N + block.to(tl.int64) * columns * RANK
            b_at = right + (k.to(tl.int64) * columns)[:, None] + j[None, :]
            further = DEPTH * columns
        b = tl.load(b_at, mask=(j[None, :] < columns) & (k[:, None] < RANK), other=0.0)
        if STOCHASTIC:
            key = tl.load(keys + job)
            pair = (program % across * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)).to(tl.uint32) * 0x9E3779B1
        for tile in tl.range(0, TILES, num_stages=STAGES):
            i = (program % programs // across * TILES + tile) * ROWS + tl.arange(0, ROWS)
            row = block % blocks * rows + i
            here = (i[:, None] < rows) & (j[None, :] < columns)
            start = W + row_starts(row, length, outer_stride, row_stride, EVEN)
            at = start[:, None] + (j.to(tl.int64) * column_stride)[None, :]
            w = tl.load(at, mask=here, other=0.0)
            lifted = tl.zeros((ROWS, COLUMNS), tl.float32)
            for first in tl.static_range(0, RANK, DEPTH):
                a_at = left + (i.to(tl.int64) * RANK)[:, None] + (first + k)[None, :]
                a = tl.load(a_at, mask=(i[:, None] < rows) & (k[None, :] < RANK - first), other=0.0)
                if first == 0:
                    lifted = multiply(a, b, lifted)
                else:
                    more_at = b_at + (first // DEPTH) * further
                    more = tl.load(more_at, mask=(j[None, :] < columns) & (k[:, None] < RANK - first), other=0.0)
                    lifted = multiply(a, more, lifted)
            new = w.to(tl.float32) * (1.0 - decay) - step * lifted
            noise = 0
            if STOCHASTIC:  # 16 bits for each of two neighbours
                drawn = mixed(row_keys(key, row)[:, None] ^ pair[None, :])
                noise = tl.interleave(drawn, drawn << 16)
            tl.store(at, rounded(new, noise, TYPE, STOCHASTIC), mask=here)


def add_at_(
    W: Scattered, layout: Layout, positions: Scattered, values: Tensor, ok: Tensor, *, step: float, keys: Tensor | None
) -> None:
    """W[S] <- W[S] - step values, for a row-balanced support.

    A bfloat16 weight is rounded here a second time, by other noise than in ``apply_update_``; ``core`` rounds the sum.

    Args:
        W, layout, ok, keys: as there.
        positions: columns, int32 [blocks, rows, k], contiguous.
        values: float32 [jobs x blocks, rows, k].
        step: factor on the values.
    """
    count, entries = values.shape[-1], values.numel() // len(ok)
    kernel: Any = _add_at
    kernel[(triton.cdiv(entries, 1024), len(ok))](
        W.addresses, positions.addresses, values, ok, ok if keys is None else keys, entries, count, step,
        **layout.strides, **W.pointer, INDEX_ALIGNED=positions.alignment, STOCHASTIC=keys is not None, SALT=SPARSE_KEY,
        BLOCK=1024, num_warps=4,
    )  # fmt: skip


@triton.jit
def _add_at(
    weights, positions, values, ok, keys, entries, count, step,
    length, outer_stride, row_stride, column_stride, EVEN: tl.constexpr,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, INDEX_ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr, SALT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    job = tl.program_id(1)
    if tl.load(ok + job) > 0.0:
        entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        here = entry < entries
        j = tl.load(pointer_at(positions, job, tl.int32, INDEX_ALIGNED) + entry, mask=here, other=0)
        row = entry // count
        start = row_starts(row, length, outer_stride, row_stride, EVEN)
        at = pointer_at(weights, job, TYPE, ALIGNED) + start + j.to(tl.int64) * column_stride
        n = tl.load(values + job.to(tl.int64) * entries + entry, mask=here, other=0.0)
        new = tl.load(at, mask=here, other=0.0).to(tl.float32) - step * n
        noise = 0
        if STOCHASTIC:
            noise = mixed(row_keys(tl.load(keys + job) ^ SALT, row) ^ (j.to(tl.uint32) * 0x9E3779B1))
        tl.store(at, rounded(new, noise, TYPE, STOCHASTIC), mask=here)
