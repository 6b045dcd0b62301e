"""Moments that are stored in 16 or 8 bits (``core.precision``): read, updated and stored in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels.adam import clipped, lerp, log_of, normalised, product
from galore_trainer.kernels.tables import GOLDEN, Scattered, cdiv, mixed, pointer_at, rounded, row_keys

BLOCK = 256  # entries that share a scale, as in ``core.precision``
SHARING = tl.constexpr(BLOCK)
GROUPS = 8  # such blocks of entries in a program
LAST = tl.constexpr(254)  # the code before the largest


class Small(NamedTuple):
    """A moment of every matrix.

    Attributes:
        values: bfloat16, or uint8 codes, contiguous.
        scales: of codes, float32 [blocks, blocks of 256 entries], contiguous; None for bfloat16.
    """

    values: Scattered
    scales: Scattered | None


def adam_small_(
    M: Small,
    V: Small,
    t: Scattered,
    R: Tensor,
    ok: Tensor,
    keys: Tensor,
    codes: tuple[Tensor, Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    dtype: torch.dtype,
    clip: Tensor | None = None,
) -> Tensor:
    """``adam_`` for moments of 16 or 8 bits, rounded stochastically as by ``core.precision.encode``.

    Args:
        M, V: moments, both in the same form.
        t: ages of the moments before this step, float32 scalars.
        R: float32 [matrices x blocks, ...].
        ok: [matrices], 1.0 or 0.0. Where it is 0.0 moments stay, and entries of N are left undefined.
        keys: int64 [matrices], of the noise.
        codes: the values of signed and of unsigned codes, float32 [256]; not read for 16 bits.
        betas, eps: of Adam.
        dtype: of N, which is rounded to nearest.
        clip: float32 scalar that multiplies R; None is 1.

    Returns:
        N, in the shape of R, of the moments before they are rounded.
    """
    N = torch.empty_like(R, dtype=dtype)
    total = len(R)
    entries, blocks = R.numel() // total, total // len(ok)
    b1, b2 = betas
    kernel: Any = _adam_small
    kernel[(cdiv(entries, GROUPS * BLOCK), total)](
        M.values.addresses,
        V.values.addresses,
        (M.scales or t).addresses,  # pointers that are not read where there are no scales
        (V.scales or t).addresses,
        *codes,
        t.addresses,
        R,
        ok,
        keys,
        clip,
        N,
        entries,
        blocks,
        1.0 - b1,
        1.0 - b2,
        log_of(b1),
        log_of(b2),
        eps,
        TYPE=M.values.pointer["TYPE"],
        ALIGNED=min(M.values.alignment, V.values.alignment),
        CODED=M.scales is not None,
        GROUPS=GROUPS,
        num_warps=8,
    )
    return N


@triton.jit
def _adam_small(
    M,
    V,
    M_scales,
    V_scales,
    signed_table,
    unsigned_table,
    t,
    R,
    ok,
    keys,
    clip,
    N,
    entries,
    blocks,
    rate1,
    rate2,
    log_beta1,
    log_beta2,
    eps,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CODED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A program updates ``GROUPS`` blocks of 256 entries of one block of a matrix."""
    block = tl.program_id(1)
    matrix, part = block // blocks, block % blocks
    if tl.load(ok + matrix) > 0.0:
        age = tl.load(pointer_at(t, matrix, tl.float32, 4)) + 1.0
        groups = tl.cdiv(entries, SHARING)  # of a block
        group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
        lane = tl.arange(0, SHARING)
        entry = group[:, None] * SHARING + lane[None, :]
        mask = entry < entries
        joined = block.to(tl.int64) * entries + entry  # position in R and N
        r = clipped(tl.load(R + joined, mask=mask, other=0.0), clip)
        within = part.to(tl.int64) * entries + entry
        m_at = pointer_at(M, matrix, TYPE, ALIGNED) + within
        v_at = pointer_at(V, matrix, TYPE, ALIGNED) + within
        noise = mixed(row_keys(tl.load(keys + matrix), part * groups + group)[:, None] ^ (lane.to(tl.uint32) * GOLDEN))
        if CODED:
            scale_at = part.to(tl.int64) * groups + group
            m_scale = pointer_at(M_scales, matrix, tl.float32, 4) + scale_at
            v_scale = pointer_at(V_scales, matrix, tl.float32, 4) + scale_at
            m = decoded(m_at, m_scale, signed_table, mask, group < groups)
            root = decoded(v_at, v_scale, unsigned_table, mask, group < groups)
            v = product(root, root)
        else:
            m = tl.load(m_at, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(v_at, mask=mask, other=0.0).to(tl.float32)
        m = lerp(m, r, rate1)
        v = lerp(v, product(r, r), rate2)
        dtype: tl.constexpr = N.dtype.element_ty
        n = normalised(m, v, age, log_beta1, log_beta2, eps)
        tl.store(N + joined, rounded(n, 0, dtype, False), mask=mask)
        # The upper 16 bits round M, the lower ones V.
        if CODED:
            encode(m, noise, m_at, m_scale, signed_table, mask, group < groups, True)
            encode(tl.sqrt_rn(v), noise << 16, v_at, v_scale, unsigned_table, mask, group < groups, False)
        else:
            tl.store(m_at, rounded(m, noise, TYPE, True), mask=mask)
            tl.store(v_at, rounded(v, noise << 16, TYPE, True), mask=mask)


@triton.jit
def decoded(at, scale_at, values, mask, inside):
    """What codes stand for, 0 outside of the mask."""
    code = tl.load(at, mask=mask, other=0).to(tl.int32)
    scale = tl.load(scale_at, mask=inside, other=0.0)[:, None]
    return tl.where(mask, product(tl.load(values + code), tl.broadcast_to(scale, code.shape)), 0.0)


@triton.jit
def encode(x, noise, at, scale_at, values, mask, inside, SIGNED: tl.constexpr):
    """Store codes and scales of [groups, 256] numbers, which are 0 outside of the mask."""
    size = tl.abs(x)
    lane = tl.arange(0, SHARING)[None, :]
    largest = tl.max(size, axis=1)[:, None]
    first = tl.min(tl.where(size == largest, lane, SHARING), axis=1)[:, None]
    scale = tl.sum(tl.where(lane == first, x, 0.0), axis=1)  # with its sign, so that this entry is 1
    divisor = tl.where(scale == 0.0, 1.0, scale)[:, None]
    q = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    guess = code_near(q, SIGNED)  # the largest code whose value is at most q, or the one below
    low, high = tl.load(values + guess), tl.load(values + guess + 1)
    above = (q >= high) & (guess < LAST)
    code = tl.where(above, guess + 1, guess)
    next_high = tl.load(values + guess + 2, mask=above, other=1.0)
    low, high = tl.where(above, high, low), tl.where(above, next_high, high)
    share = (noise >> 16).to(tl.float32) / 65536.0
    code += (q - low > (high - low) * share).to(tl.int32)
    if not SIGNED:  # code 0 of a positive number would divide M by zero
        code = tl.where((x > 0.0) & (code < 1), 1, code)
    tl.store(at, code.to(tl.uint8), mask=mask)
    tl.store(scale_at, scale, mask=inside)


@triton.jit
def code_near(q, SIGNED: tl.constexpr):
    """A code 0 ... 254 whose value, or else the next one, is the largest of the table that is at most q.

    Every decade of ``core.precision`` has half as many values as the one above, at the middles of equal parts. Values
    at most q are counted with a small bias downwards, since the product with a power of ten is not exact. At a power of
    ten both decades give the same count.
    """
    a = tl.abs(q)
    halvings = 126 - (a.to(tl.int32, bitcast=True) >> 23)  # a < 2^-halvings
    decade = tl.minimum(tl.maximum(halvings * 77 >> 8, 0), 6)  # 77 / 256 is a little below log10(2)
    a *= tl.exp2(decade.to(tl.float32) * 3.3219281)
    lower = (a < 0.1) & (decade < 6)
    a = tl.where(lower, a * 10.0, a)
    parts = (64 if SIGNED else 128) >> tl.where(lower, decade + 1, decade)
    bias = tl.where(q < 0.0, 1.0, -1.0) * 1e-3
    passed = tl.floor((a - 0.1) * (parts.to(tl.float32) / 0.9) + (0.5 + bias)).to(tl.int32)
    count = parts - (1 if SIGNED else 2) + tl.minimum(tl.maximum(passed, 0), parts)
    if SIGNED:
        count = tl.where(q < 0.0, 126 - count, 127 + count)
    return tl.minimum(tl.maximum(count, 0), LAST)
