"""Moments take a gradient in: by ``core``, or, one matrix on a CPU, in one pass by torch's fused AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from galore_trainer.core import galore
from galore_trainer.optim.stack import Stack


def take_in(stack: Stack, moments: Sequence[tuple[str, bool]], age: str, R: Tensor, ok: Tensor) -> Tensor:
    """Take R into a pair of moments of a stack's state and normalise; the update N.

    Args:
        stack: equal matrices.
        moments: keys of the first and the second moment, and whether they have a sign.
        age: key of their age.
        R: projected gradients, or the residual's entries, float32 in the moments' shape.
        ok: [jobs x blocks, 1, 1], 1.0, or 0.0: there the moments stay, bit for bit, and N is 0.
    """
    betas, eps = stack.group["betas"], stack.group["eps"]
    if type(R) is Tensor and _is_simple(stack):
        return _fused(stack, [key for key, _ in moments], age, R, bool(ok.view(-1)[0]), betas, eps)
    M, V = (stack.get_moment(key, signed=signed) for key, signed in moments)
    M, V, t, N = galore.adam(M, V, stack.get_count(age), R, ok, betas=betas, eps=eps)
    for (key, signed), value in zip(moments, (M, V), strict=True):
        stack.put_moment(key, value, signed=signed, ok=ok)
    stack.put_count(age, t)
    return N


def _is_simple(stack: Stack) -> bool:
    """One matrix on a CPU with float32 moments. Without eps 0 / 0 must give 0, which ``core`` alone sees to."""
    bits, eps = stack.group["galore"]["state_bits"], stack.group["eps"]
    return len(stack.jobs) == 1 and stack.device.type == "cpu" and bits == 32 and eps > 0.0


def _fused(
    stack: Stack, keys: Sequence[str], age: str, R: Tensor, ok: bool, betas: tuple[float, float], eps: float
) -> Tensor:
    """N is what AdamW makes of a weight of zeros at the learning rate -1."""
    N = torch.zeros_like(R, memory_format=torch.contiguous_format)
    if not ok:
        return N
    state, prefix = stack.jobs[0].state, stack.jobs[0].prefix
    M, V = (state[prefix + key] for key in keys)
    t = state[prefix + age] + 1.0
    torch.ops.aten._fused_adamw_(  # what torch.optim.AdamW calls, without its wrappers, which take as long here
        [N], [R.contiguous()], [M], [V], [], [t], lr=-1.0, beta1=betas[0], beta2=betas[1], weight_decay=0.0,
        eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    for key, value in zip((*keys, age), (M, V, t), strict=True):
        state[prefix + key] = value  # M and V may be copies
    return N
