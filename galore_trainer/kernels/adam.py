"""Adam's moments, in place where they lie, and the normalised update."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels.tables import Scattered, pointer_at, rounded

BLOCK = 2048


def adam_(
    M: Scattered, V: Scattered, t: Scattered, R: Tensor, ok: Tensor, *,
    betas: tuple[float, float], eps: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Take R into the moments, in place; what ``core.galore.adam`` calls N.

    Args:
        M, V: float32, contiguous, each with its job's share of the entries of R.
        t: their ages before this step, scalars, float32; they stay (``count.py`` counts).
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
