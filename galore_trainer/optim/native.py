"""Moments take gradients in: by ``core``, or, single matrices on a CPU, all in one pass by torch's fused AdamW."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_trainer.core import galore
from galore_trainer.optim.stack import Stack


class Incoming(NamedTuple):
    """What a stack's moments take in.

    Attributes:
        stack: equal matrices.
        R: projected gradients, or the residual's entries, in the moments' shape and dtype.
        ok: [jobs x blocks, 1, 1], 1.0, or 0.0: there the moments stay, bit for bit, and N is 0.
    """

    stack: Stack
    R: Tensor
    ok: Tensor


def take_in(incoming: Sequence[Incoming], moments: Sequence[tuple[str, bool]], age: str) -> list[Tensor]:
    """Take R into a pair of moments of each stack's state and normalise; the update N of each.

    Args:
        incoming: each stack once.
        moments: keys of the first and the second moment, and whether they have a sign.
        age: key of their age.
    """
    found: list[Tensor] = []
    alike: dict[tuple[Any, ...], list[tuple[Stack, Tensor, Tensor]]] = defaultdict(list)
    for stack, R, ok in incoming:
        betas, eps = stack.group["betas"], stack.group["eps"]
        key = (*betas, eps)
        if type(R) is Tensor and _is_simple(stack):
            N = torch.zeros_like(R, memory_format=torch.contiguous_format)
            if ok.view(-1)[0].item() > 0.0:
                alike[key].append((stack, R.contiguous(), N))
        else:
            M, V = (stack.get_moment(name, signed=signed) for name, signed in moments)
            M, V, t, N = galore.adam(M, V, stack.get_count(age), R, ok, betas=betas, eps=eps)
            for (name, signed), value in zip(moments, (M, V), strict=True):
                stack.put_moment(name, value, signed=signed, ok=ok)
            stack.put_count(age, t)
        found.append(N)
    for (b1, b2, eps), members in alike.items():
        _fused(members, [key for key, _ in moments], age, (b1, b2), eps)
    return found


def _is_simple(stack: Stack) -> bool:
    """One matrix on a CPU with unrounded moments. Without eps 0 / 0 must give 0, which ``core`` alone sees to."""
    bits, eps = stack.group["galore"]["state_bits"], stack.group["eps"]
    return len(stack.jobs) == 1 and stack.device.type == "cpu" and bits == 32 and eps > 0.0


def _fused(
    members: Sequence[tuple[Stack, Tensor, Tensor]], keys: Sequence[str], age: str, betas: tuple[float, float],
    eps: float,
) -> None:  # fmt: skip
    """N, of zeros, becomes what AdamW makes of a weight at the learning rate -1."""
    stacks, R, N = zip(*members, strict=True)
    first, second = ([stack.get(key) for stack in stacks] for key in keys)
    ages = torch._foreach_add([stack.jobs[0].state[stack.jobs[0].prefix + age] for stack in stacks], 1.0)
    torch.ops.aten._fused_adamw_(  # what torch.optim.AdamW calls, without its wrappers, which take as long here
        N, R, first, second, [], ages, lr=-1.0, beta1=betas[0], beta2=betas[1], weight_decay=0.0,
        eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    for stack, *values in zip(stacks, first, second, ages, strict=True):
        job = stack.jobs[0]
        for key, value in zip((*keys, age), values, strict=True):
            job.state[job.prefix + key] = value  # moments of a part of a weight may be copies
