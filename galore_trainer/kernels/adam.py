"""Adam: moments and normalised updates of projected gradients, AdamW of plain weights, and the count of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels.tables import GOLDEN, TINY, Scattered, cdiv, mixed, pointer_at, rounded, row_keys, unpacked

BLOCK = 2048


def adam_(
    M: Scattered,
    V: Scattered,
    t: Scattered,
    R: Tensor,
    ok: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    dtype: torch.dtype,
    clip: Tensor | None = None,
) -> Tensor:
    """Add R to the moments, in place, and return N of ``core.galore.adam``.

    Args:
        M, V: moments, float32, contiguous; of every matrix as many entries as R has of it.
        t: ages of the moments before this step, float32 scalars; ``count_`` increases them.
        R: float32 [matrices x blocks, ...].
        ok: [matrices], 1.0 or 0.0. Where it is 0.0 moments stay, and entries of N are left undefined.
        betas, eps: of Adam.
        dtype: of N, which is rounded to nearest.
        clip: float32 scalar that multiplies R; None is 1.

    Returns:
        N, in the shape of R.
    """
    N = torch.empty_like(R, dtype=dtype)
    entries = R.numel() // len(ok)
    b1, b2 = betas
    kernel: Any = _adam
    kernel[(cdiv(entries, BLOCK), len(ok))](
        M.addresses,
        V.addresses,
        t.addresses,
        R,
        ok,
        clip,
        N,
        entries,
        1.0 - b1,
        1.0 - b2,
        log_of(b1),
        log_of(b2),
        eps,
        ALIGNED=min(M.alignment, V.alignment),
        BLOCK=BLOCK,
        num_warps=8,
    )
    return N


def log_of(beta: float) -> float:
    """The logarithm of a decay rate; minus infinity for zero."""
    return math.log(beta) if beta > 0.0 else -math.inf


@triton.jit
def decay_sum(t, log_beta):
    """1 - beta^t, in float64 because it cancels for small t."""
    return (1.0 - tl.exp(t.to(tl.float64) * log_beta)).to(tl.float32)


@triton.jit
def lerp(a, b, weight):
    """a + weight (b - a), computed from the nearer end as in torch.lerp."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - (1.0 - weight) * (b - a))


@triton.jit
def product(a, b):
    """a b, rounded by itself: the compiler does not make one operation of it and of a sum that follows."""
    return tl.fma(a, b, 0.0)


@triton.jit
def clipped(x, clip):
    """x times the factor of clipping, where there is one."""
    if clip is not None:
        x = product(x, tl.broadcast_to(tl.load(clip), x.shape))
    return x


@triton.jit
def normalised(m, v, age, log_beta1, log_beta2, eps):
    """The update of moments of this age."""
    denominator = tl.sqrt(v / decay_sum(age, log_beta2)) + eps
    return (m / decay_sum(age, log_beta1)) / tl.maximum(denominator, TINY)


@triton.jit
def _adam(
    M,
    V,
    t,
    R,
    ok,
    clip,
    N,
    entries,
    rate1,
    rate2,
    log_beta1,
    log_beta2,
    eps,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program updates ``BLOCK`` entries of one matrix."""
    matrix = tl.program_id(1)
    if tl.load(ok + matrix) > 0.0:
        age = tl.load(pointer_at(t, matrix, tl.float32, 4)) + 1.0
        entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = entry < entries
        m_at = pointer_at(M, matrix, tl.float32, ALIGNED) + entry
        v_at = pointer_at(V, matrix, tl.float32, ALIGNED) + entry
        joined = matrix.to(tl.int64) * entries + entry  # position in R and N
        r = clipped(tl.load(R + joined, mask=mask, other=0.0), clip)
        m = tl.load(m_at, mask=mask, other=0.0)
        v = tl.load(v_at, mask=mask, other=0.0)
        m = lerp(m, r, rate1)
        v = lerp(v, product(r, r), rate2)
        tl.store(m_at, m, mask=mask)
        tl.store(v_at, v, mask=mask)
        n = normalised(m, v, age, log_beta1, log_beta2, eps)
        dtype: tl.constexpr = N.dtype.element_ty
        tl.store(N + joined, rounded(n, 0, dtype, False), mask=mask)


def adamw_(
    W: Scattered,
    G: Scattered,
    M: Scattered,
    V: Scattered,
    t: Scattered,
    ok: Tensor,
    entries: int,
    *,
    rates: Tensor,
    betas: tuple[float, float],
    eps: float,
    keys: Tensor | None,
    clip: Tensor | None = None,
) -> None:
    """One step of ``torch.optim.AdamW`` on plain weights, in place, computed in float32.

    Args:
        W, G: weights and gradients, float32 or bfloat16, contiguous.
        M, V: moments, float32, contiguous.
        t: ages of the moments before this step, float32 scalars; ``count_`` increases them.
        ok: [weights], 1.0 or 0.0. Where it is 0.0 weight and moments stay.
        entries: number of entries of a weight.
        rates: int64 [weights], ``tables.packed`` of lr and lr x weight decay.
        betas, eps: of AdamW.
        keys: int64 [weights], for stochastic rounding of bfloat16 weights; None rounds to nearest.
        clip: float32 scalar that multiplies G; None is 1.
    """
    kernel: Any = _adamw
    kernel[(cdiv(entries, BLOCK), len(ok))](
        W.addresses,
        G.addresses,
        M.addresses,
        V.addresses,
        t.addresses,
        ok,
        ok if keys is None else keys,  # a pointer that is not read
        clip,
        entries,
        rates,
        1.0 - betas[0],
        1.0 - betas[1],
        log_of(betas[0]),
        log_of(betas[1]),
        eps,
        **W.pointer,
        G_TYPE=G.pointer["TYPE"],
        G_ALIGNED=G.alignment,
        STATE_ALIGNED=min(M.alignment, V.alignment),
        STOCHASTIC=keys is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )


@triton.jit
def _adamw(
    weights,
    gradients,
    M,
    V,
    t,
    ok,
    keys,
    clip,
    entries,
    rates,
    rate1,
    rate2,
    log_beta1,
    log_beta2,
    eps,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    G_TYPE: tl.constexpr,
    G_ALIGNED: tl.constexpr,
    STATE_ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program moves ``BLOCK`` entries of one weight."""
    chunk, weight = tl.program_id(0), tl.program_id(1)
    if tl.load(ok + weight) > 0.0:
        age = tl.load(pointer_at(t, weight, tl.float32, 4)) + 1.0
        minus_lr, decay = unpacked(rates, weight)
        lane = tl.arange(0, BLOCK)
        entry = chunk.to(tl.int64) * BLOCK + lane
        mask = entry < entries
        w_at = pointer_at(weights, weight, TYPE, ALIGNED) + entry
        m_at = pointer_at(M, weight, tl.float32, STATE_ALIGNED) + entry
        v_at = pointer_at(V, weight, tl.float32, STATE_ALIGNED) + entry
        w = tl.load(w_at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(pointer_at(gradients, weight, G_TYPE, G_ALIGNED) + entry, mask=mask, other=0.0).to(tl.float32)
        g = clipped(g, clip)
        m = lerp(tl.load(m_at, mask=mask, other=0.0), g, rate1)
        v = lerp(tl.load(v_at, mask=mask, other=0.0), g * g, rate2)
        tl.store(m_at, m, mask=mask)
        tl.store(v_at, v, mask=mask)
        denominator = tl.sqrt(v / decay_sum(age, log_beta2)) + eps
        new = w * (1.0 - decay) + minus_lr * (m / decay_sum(age, log_beta1)) / tl.maximum(denominator, TINY)
        noise = 0
        if STOCHASTIC:
            noise = mixed(row_keys(tl.load(keys + weight), chunk) ^ (lane.to(tl.uint32) * GOLDEN))
        tl.store(w_at, rounded(new, noise, TYPE, STOCHASTIC), mask=mask)


def usable(G: Scattered, entries: int, limit: float) -> Tensor:
    """1.0 where every entry of a gradient is smaller than a limit in magnitude, else 0.0: float32 [weights].

    Args:
        G: gradients, float32 or bfloat16, contiguous.
        entries: of a gradient.
        limit: as ``core.galore.largest_usable``.
    """
    ok = torch.ones(len(G.addresses), dtype=torch.float32, device=G.addresses.device)
    kernel: Any = _usable
    kernel[(cdiv(entries, BLOCK), len(ok))](G.addresses, ok, entries, limit, **G.pointer, BLOCK=BLOCK, num_warps=8)
    return ok


@triton.jit
def _usable(gradients, ok, entries, limit, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """A program looks at ``BLOCK`` entries of one gradient."""
    weight = tl.program_id(1)
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(pointer_at(gradients, weight, TYPE, ALIGNED) + entry, mask=entry < entries, other=0.0)
    below = tl.min((tl.abs(g.to(tl.float32)) < limit).to(tl.int32), axis=0)  # 0 for NaN, too
    tl.store(ok + weight, 0.0, mask=below == 0)


def count_(ages: Sequence[Scattered], skipped: Scattered, ok: Tensor) -> None:
    """Count one step of every weight, in place.

    Args:
        ages: up to two tables of float32 scalars, which grow by ``ok``.
        skipped: int32 [3] for every weight: skipped steps since the last usable one, all skipped steps, and the largest
            number of consecutive ones.
        ok: [weights], 1.0 or 0.0.
    """
    kernel: Any = _count
    first, second = [age.addresses for age in ages] + [ok] * (2 - len(ages))  # ok: pointers that are not read
    kernel[(len(ok),)](first, second, skipped.addresses, ok, AGES=len(ages), num_warps=1)


@triton.jit
def _count(first, second, skipped, ok, AGES: tl.constexpr):
    """A program counts the step of one weight."""
    weight = tl.program_id(0)
    usable = tl.load(ok + weight)
    if AGES > 0:
        age = tl.load(first + weight).to(tl.pointer_type(tl.float32))
        tl.store(age, tl.load(age) + usable)
    if AGES > 1:
        age = tl.load(second + weight).to(tl.pointer_type(tl.float32))
        tl.store(age, tl.load(age) + usable)
    counters = tl.load(skipped + weight).to(tl.pointer_type(tl.int32))
    is_skipped = 1 - usable.to(tl.int32)
    consecutive = (tl.load(counters) + 1) * is_skipped
    tl.store(counters, consecutive)
    tl.store(counters + 1, tl.load(counters + 1) + is_skipped)
    tl.store(counters + 2, tl.maximum(tl.load(counters + 2), consecutive))
