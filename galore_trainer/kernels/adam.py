"""Adam: moments in place where they lie, the normalised update, AdamW of plain weights, and the count of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels.tables import Scattered, mixed, pointer_at, rounded, row_keys

BLOCK = 2048


def adam_(
    M: Scattered, V: Scattered, t: Scattered, R: Tensor, ok: Tensor, *,
    betas: tuple[float, float], eps: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Take R into the moments, in place; what ``core.galore.adam`` calls N.

    Args:
        M, V: float32, contiguous, each with its job's share of the entries of R.
        t: their ages before this step, scalars, float32; they stay (see ``count_``).
        R: float32 [jobs x ..., ...].
        ok: [jobs]; where it is 0.0 the moments stay, and nothing is written to N.
        betas, eps: of Adam.
        dtype: of N; bfloat16 rounds to nearest.
    """
    N = torch.empty_like(R, dtype=dtype)
    entries = R.numel() // len(ok)
    b1, b2 = betas
    kernel: Any = _adam
    kernel[(triton.cdiv(entries, BLOCK), len(ok))](
        M.addresses, V.addresses, t.addresses, R, ok, N, entries, 1.0 - b1, 1.0 - b2, log_of(b1), log_of(b2), eps,
        ALIGNED=min(M.alignment, V.alignment), BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return N


def log_of(beta: float) -> float:
    """The logarithm of a decay rate, which may be zero."""
    return math.log(beta) if beta > 0.0 else -math.inf


@triton.jit
def decay_sum(t, log_beta):
    """1 - beta^t: in float64, as it cancels for small t."""
    return (1.0 - tl.exp(t.to(tl.float64) * log_beta)).to(tl.float32)


@triton.jit
def lerp(a, b, share):
    """a + share (b - a), from the nearer end, as torch does."""
    return tl.where(share < 0.5, a + share * (b - a), b - (1.0 - share) * (b - a))


@triton.jit
def _adam(
    M, V, t, R, ok, N, entries, rate1, rate2, log_beta1, log_beta2, eps,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    job = tl.program_id(1)
    if tl.load(ok + job) > 0.0:
        age = tl.load(pointer_at(t, job, tl.float32, 4)) + 1.0
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        here = at < entries
        m_at = pointer_at(M, job, tl.float32, ALIGNED) + at
        v_at = pointer_at(V, job, tl.float32, ALIGNED) + at
        of_all = job.to(tl.int64) * entries + at
        r = tl.load(R + of_all, mask=here, other=0.0)
        m = tl.load(m_at, mask=here, other=0.0)
        v = tl.load(v_at, mask=here, other=0.0)
        m = lerp(m, r, rate1)
        v = lerp(v, r * r, rate2)
        tl.store(m_at, m, mask=here)
        tl.store(v_at, v, mask=here)
        below = tl.sqrt(v / decay_sum(age, log_beta2)) + eps
        n = (m / decay_sum(age, log_beta1)) / tl.maximum(below, 1.1754943508222875e-38)
        to: tl.constexpr = N.dtype.element_ty
        tl.store(N + of_all, rounded(n, 0, to, False), mask=here)


def adamw_(
    W: Scattered, G: Scattered, M: Scattered, V: Scattered, t: Tensor, ok: Tensor, entries: int, *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, keys: Tensor | None,
) -> None:  # fmt: skip
    """One step of ``torch.optim.AdamW`` computed in float32; nothing moves where ``ok`` is 0.

    Args:
        W, G: weights and gradients, float32 or bfloat16, contiguous.
        M, V: float32, contiguous.
        t: age of the moments, this step included, float32 [count].
        ok: 1.0 or 0.0 for each tensor, [count].
        entries: of each tensor.
        lr, betas, eps, weight_decay: of AdamW.
        keys: int64 [count], round bfloat16 weights stochastically; None rounds to nearest.
    """
    kernel: Any = _adamw
    kernel[(triton.cdiv(entries, BLOCK), len(ok))](
        W.addresses, G.addresses, M.addresses, V.addresses, t, ok, ok if keys is None else keys, entries,
        lr, lr * weight_decay, 1.0 - betas[0], 1.0 - betas[1], log_of(betas[0]), log_of(betas[1]), eps,
        **W.pointer, G_TYPE=G.pointer["TYPE"], G_ALIGNED=G.alignment, STATE_ALIGNED=min(M.alignment, V.alignment),
        STOCHASTIC=keys is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


@triton.jit
def _adamw(
    weights, gradients, M, V, t, ok, keys, entries, lr, decay, rate1, rate2, log_beta1, log_beta2, eps,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, G_TYPE: tl.constexpr, G_ALIGNED: tl.constexpr,
    STATE_ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, job = tl.program_id(0), tl.program_id(1)
    if tl.load(ok + job) > 0.0:
        age = tl.load(t + job)
        lane = tl.arange(0, BLOCK)
        at = chunk.to(tl.int64) * BLOCK + lane
        here = at < entries
        w_at = pointer_at(weights, job, TYPE, ALIGNED) + at
        m_at = pointer_at(M, job, tl.float32, STATE_ALIGNED) + at
        v_at = pointer_at(V, job, tl.float32, STATE_ALIGNED) + at
        w = tl.load(w_at, mask=here, other=0.0).to(tl.float32)
        g = tl.load(pointer_at(gradients, job, G_TYPE, G_ALIGNED) + at, mask=here, other=0.0).to(tl.float32)
        m = lerp(tl.load(m_at, mask=here, other=0.0), g, rate1)
        v = lerp(tl.load(v_at, mask=here, other=0.0), g * g, rate2)
        tl.store(m_at, m, mask=here)
        tl.store(v_at, v, mask=here)
        below = tl.sqrt(v / decay_sum(age, log_beta2)) + eps
        new = w * (1.0 - decay) - lr * (m / decay_sum(age, log_beta1)) / tl.maximum(below, 1.1754943508222875e-38)
        noise = 0
        if STOCHASTIC:
            noise = mixed(row_keys(tl.load(keys + job), chunk) ^ (lane.to(tl.uint32) * 0x9E3779B1))
        tl.store(w_at, rounded(new, noise, TYPE, STOCHASTIC), mask=here)


def count_(ages: Sequence[Scattered], skipped: Scattered, ok: Tensor) -> None:
    """Count one step of every weight, in place.

    Args:
        ages: up to two tables of scalars, float32; each grows by ``ok``.
        skipped: int32 [3] of every weight: skipped steps in a row, in all, longest row.
        ok: [weights], 1.0 or 0.0.
    """
    kernel: Any = _count
    first, second = [age.addresses for age in ages] + [ok] * (2 - len(ages))
    kernel[(len(ok),)](first, second, skipped.addresses, ok, AGES=len(ages), num_warps=1)


@triton.jit
def _count(first, second, skipped, ok, AGES: tl.constexpr):
    job = tl.program_id(0)
    good = tl.load(ok + job)
    if AGES > 0:
        age = tl.load(first + job).to(tl.pointer_type(tl.float32))
        tl.store(age, tl.load(age) + good)
    if AGES > 1:
        age = tl.load(second + job).to(tl.pointer_type(tl.float32))
        tl.store(age, tl.load(age) + good)
    counters = tl.load(skipped + job).to(tl.pointer_type(tl.int32))
    bad = 1 - good.to(tl.int32)
    in_a_row = (tl.load(counters) + 1) * bad
    tl.store(counters, in_a_row)
    tl.store(counters + 1, tl.load(counters + 1) + bad)
    tl.store(counters + 2, tl.maximum(tl.load(counters + 2), in_a_row))
