"""W <- W - lr wd W - lr scale (lift(N) + phi D + N_S at S), in place, for weights at any address."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels import has_warpgroups, shared_memory
from galore_trainer.kernels.looped import GROUP, apply_looped, described
from galore_trainer.kernels.routes import UpdateRoute, route_of
from galore_trainer.kernels.tables import (
    GOLDEN,
    Layout,
    Scattered,
    cdiv,
    mixed,
    moved,
    multiply,
    next_power_of_2,
    pointer_at,
    rounded,
    row_keys,
    row_starts,
    unpacked,
)

WARPS = 4  # warps of a program of ``add_at_``
TILES = 16  # most tiles of a program, one below the other: loads of the next tiles overlap with the products of one
SPARSE_KEY = 0x5851F42D4C957F2D  # makes the noise of ``add_at_`` differ from that of ``apply_update_``
BLOCK = 1024  # entries of a support in a program


class Dense(NamedTuple):
    """What moves weights beside lift(N): phi G (``core.scaled``).

    Attributes:
        G: gradients, float32 or bfloat16.
        layout: of a logical matrix in its gradient.
        phi: float32 [matrices x blocks, lines].
    """

    G: Scattered
    layout: Layout
    phi: Tensor


def apply_update_(
    W: Scattered,
    layout: Layout,
    N: Tensor,
    P: Tensor,
    side: str,
    ok: Tensor,
    blocks: int,
    *,
    rates: Tensor,
    keys: Tensor | None,
    dense: Dense | None = None,
) -> None:
    """W <- W (1 - decay) - step (lift(N) + phi G), in place.

    Args:
        W: weights, float32 or bfloat16.
        layout: of a logical matrix in its weight.
        N, P: [matrices x blocks, ...] as in ``core.galore``, in the dtype of W or in bfloat16.
        side: ``right`` or ``left``.
        ok: [matrices], 1.0 or 0.0. Where it is 0.0 the weight stays.
        blocks: number of blocks of a matrix.
        rates: int64 [matrices], ``tables.packed`` of step = lr x scale and decay = lr x weight decay.
        keys: int64 [matrices], for stochastic rounding of bfloat16 weights; None rounds to nearest.
        dense: for phi G; None leaves it out. N is N - phi R then.
    """
    total, rank = len(P), P.shape[-1]
    rows, columns = layout.rows // blocks, layout.columns
    width, entry = max(16, next_power_of_2(rank)), N.element_size()
    route = _tile(N, rank, dense is not None)
    tall, wide, depth = route.rows, route.columns, min(route.depth, width)
    per_entry = W.dtype.itemsize + (dense.G.dtype.itemsize if dense else 0)
    shape: dict[str, object]
    if route.looped:
        kernel: Any = apply_looped
        stages = shared_memory(N.device) // ((tall + wide) * depth * entry)
        programs = cdiv(rows, tall) * cdiv(columns, wide)
        engine = route.described and has_warpgroups(N.device)
        factors = described(N, P, side, tall, wide, depth) if engine else None
        shape = {"EARLY": route.early, "TOGETHER": GROUP, "DESCRIBED": factors is not None}
    else:
        kernel = _apply_update
        shared = depth * wide * entry  # bytes that all tiles share
        per_tile = (tall * width + (width - depth) * wide) * entry + tall * wide * per_entry  # bytes
        stages = (shared_memory(N.device) - shared) // per_tile
        tiles = min(TILES, cdiv(rows, tall))
        programs = cdiv(rows, tall * tiles) * cdiv(columns, wide)
        shape, factors = {"TILES": tiles}, None
    of_G = dense or Dense(W, layout, ok)  # pointers that are not read
    kernel[(total * programs,)](
        W.addresses,
        *(factors or (N, P)),
        ok,
        ok if keys is None else keys,  # a pointer that is not read
        rows,
        columns,
        blocks,
        rates,
        of_G.G.addresses,
        of_G.phi,
        **layout.strides,
        **W.pointer,
        **{f"G_{name}": value for name, value in (of_G.layout.strides | of_G.G.pointer).items()},
        DENSE=dense is not None,
        RIGHT=side == "right",
        RANK=rank,
        ROWS=tall,
        COLUMNS=wide,
        DEPTH=depth,
        STAGES=max(1, min(3, stages)),
        STOCHASTIC=keys is not None,
        **shape,
        num_warps=route.warps,
        maxnreg=route.registers,
    )


def _tile(N: Tensor, rank: int, has_dense: bool) -> UpdateRoute:
    """The tile of W, and how the rank is taken."""
    if N.dtype == torch.bfloat16:
        route = route_of(rank, N.dtype)
        return route.dense if has_dense and route.dense else route.update
    if not has_warpgroups(N.device):  # float32 factors are split in three; larger tiles exceed the registers
        return UpdateRoute(32, 64, depth=64)
    return UpdateRoute(64, 64, depth=128 if rank <= 128 else 64)


@triton.jit
def _apply_update(
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
    TILES: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """A program moves ``TILES`` tiles of one block, one below the other; the next program moves those on their right.

    The first ``DEPTH`` rows of ``b``, the right factor of the lift, are loaded once for all tiles.
    """
    program, across = tl.program_id(0), tl.cdiv(columns, COLUMNS)
    programs = tl.cdiv(rows, ROWS * TILES) * across
    block = program // programs
    matrix = block // blocks
    if tl.load(ok + matrix) > 0.0:
        j = program % across * COLUMNS + tl.arange(0, COLUMNS)
        k = tl.arange(0, DEPTH)
        minus_step, decay = unpacked(rates, matrix)
        W = pointer_at(weights, matrix, TYPE, ALIGNED)
        if RIGHT:
            left, right = N + block.to(tl.int64) * rows * RANK, P + block.to(tl.int64) * columns * RANK
            b_at = right + (j.to(tl.int64) * RANK)[None, :] + k[:, None]
            next_depth = DEPTH
        else:
            left, right = P + block.to(tl.int64) * rows * RANK, N + block.to(tl.int64) * columns * RANK
            b_at = right + (k.to(tl.int64) * columns)[:, None] + j[None, :]
            next_depth = DEPTH * columns
        b = tl.load(b_at, mask=(j[None, :] < columns) & (k[:, None] < RANK), other=0.0)
        if DENSE:
            G = pointer_at(gradients, matrix, G_TYPE, G_ALIGNED)
            if RIGHT:
                phi += block.to(tl.int64) * rows
            else:
                factor = tl.load(phi + block.to(tl.int64) * columns + j, mask=j < columns, other=0.0)[None, :]
        key, pair = 0, 0
        if STOCHASTIC:
            key = tl.load(keys + matrix)
            pair = (program % across * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)).to(tl.uint32) * GOLDEN
        for tile in tl.range(0, TILES, num_stages=STAGES):
            i = (program % programs // across * TILES + tile) * ROWS + tl.arange(0, ROWS)
            row = block % blocks * rows + i
            mask = (i[:, None] < rows) & (j[None, :] < columns)
            start = W + row_starts(row, length, outer_stride, row_stride, EVEN)
            at = start[:, None] + (j.to(tl.int64) * column_stride)[None, :]
            w = tl.load(at, mask=mask, other=0.0)
            if DENSE:
                g_start = G + row_starts(row, G_length, G_outer_stride, G_row_stride, G_EVEN)
                g_at = g_start[:, None] + (j.to(tl.int64) * G_column_stride)[None, :]
                g = tl.load(g_at, mask=mask, other=0.0)
                if RIGHT:
                    factor = tl.load(phi + i, mask=i < rows, other=0.0)[:, None]
            lifted = tl.zeros((ROWS, COLUMNS), tl.float32)
            for first in tl.static_range(0, RANK, DEPTH):
                a_at = left + (i.to(tl.int64) * RANK)[:, None] + (first + k)[None, :]
                a = tl.load(a_at, mask=(i[:, None] < rows) & (k[None, :] < RANK - first), other=0.0)
                if first == 0:
                    lifted = multiply(a, b, lifted)
                else:
                    next_at = b_at + (first // DEPTH) * next_depth
                    next_b = tl.load(next_at, mask=(j[None, :] < columns) & (k[:, None] < RANK - first), other=0.0)
                    lifted = multiply(a, next_b, lifted)
            if DENSE:
                lifted += factor * g.to(tl.float32)
            tl.store(at, moved(w, lifted, minus_step, decay, key, row, pair, TYPE, STOCHASTIC), mask=mask)


def add_at_(
    W: Scattered,
    layout: Layout,
    positions: Scattered,
    values: Tensor,
    ok: Tensor,
    *,
    rates: Tensor,
    keys: Tensor | None,
) -> None:
    """W[S] <- W[S] - step values, in place, for a row-balanced support.

    It follows ``apply_update_``, so that entries of a bfloat16 weight at S are rounded twice, with independent noise.
    ``core.galore`` adds both updates in float32 and rounds once.

    Args:
        W, layout, ok, rates, keys: as for ``apply_update_``.
        positions: S as columns, int32 [blocks, rows, k], contiguous.
        values: float32 [matrices x blocks, rows, k].
    """
    count, entries = values.shape[-1], values.numel() // len(ok)
    kernel: Any = _add_at
    kernel[(cdiv(entries, BLOCK), len(ok))](
        W.addresses,
        positions.addresses,
        values,
        ok,
        ok if keys is None else keys,  # a pointer that is not read
        entries,
        count,
        rates,
        **layout.strides,
        **W.pointer,
        INDEX_ALIGNED=positions.alignment,
        STOCHASTIC=keys is not None,
        SALT=SPARSE_KEY,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


@triton.jit
def _add_at(
    weights,
    positions,
    values,
    ok,
    keys,
    entries,
    count,
    rates,
    length,
    outer_stride,
    row_stride,
    column_stride,
    EVEN: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INDEX_ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SALT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program moves ``BLOCK`` entries of the support of one matrix."""
    matrix = tl.program_id(1)
    if tl.load(ok + matrix) > 0.0:
        entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = entry < entries
        j = tl.load(pointer_at(positions, matrix, tl.int32, INDEX_ALIGNED) + entry, mask=mask, other=0)
        row = entry // count
        start = row_starts(row, length, outer_stride, row_stride, EVEN)
        at = pointer_at(weights, matrix, TYPE, ALIGNED) + start + j.to(tl.int64) * column_stride
        n = tl.load(values + matrix.to(tl.int64) * entries + entry, mask=mask, other=0.0)
        minus_step, _ = unpacked(rates, matrix)
        new = tl.load(at, mask=mask, other=0.0).to(tl.float32) + minus_step * n
        noise = 0
        if STOCHASTIC:
            noise = mixed(row_keys(tl.load(keys + matrix) ^ SALT, row) ^ (j.to(tl.uint32) * GOLDEN))
        tl.store(at, rounded(new, noise, TYPE, STOCHASTIC), mask=mask)
