"""AdamW of what is not projected, many equal tensors in one launch: moments and weights in place."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels.adam import decay_sum, lerp, log_of
from galore_trainer.kernels.tables import Scattered, mixed, pointer_at, rounded, row_keys

BLOCK = 2048


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
