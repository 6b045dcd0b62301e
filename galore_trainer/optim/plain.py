"""AdamW for what is not projected: torch's fused function; bf16 weights get fp32 moments and stochastic rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from galore_trainer.core.galore import stochastic_round

CHUNK = 1 << 24  # elements of a bf16 weight that are held in float32 at a time


def plain_state(p: Tensor) -> dict[str, Any]:
    """Fresh moments of a parameter: float32, whatever the weight's dtype."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=p.device),
        "exp_avg": torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format),
        "exp_avg_sq": torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format),
    }


def plain_step(
    p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], ok: Tensor, generator: torch.Generator | None
) -> None:
    """One AdamW step in place.

    Args:
        p: parameter of any shape; float32 is updated directly, other dtypes through float32 chunks.
        grad: its gradient.
        state: from ``plain_state``.
        group: gives lr, betas, eps and weight_decay.
        ok: scalar tensor, 1.0, or 0.0 to leave everything as it is.
        generator: for stochastic rounding of bf16; None rounds to nearest.
    """
    options = dict(
        found_inf=1.0 - ok, fused=True, amsgrad=False, maximize=False, beta1=group["betas"][0], beta2=group["betas"][1],
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip
    m, v = state["exp_avg"], state["exp_avg_sq"]
    if p.dtype == torch.float32 and p.is_contiguous():
        adamw([p], [grad], [m], [v], [], [state["step"]], **options)
        return
    before = state["step"].clone()
    weight = p.contiguous().view(-1)
    parts = (x.reshape(-1).split(CHUNK) for x in (weight, grad, m, v))
    for w, g, m_part, v_part in zip(*parts, strict=True):
        state["step"].copy_(before)
        wide = w.float()
        adamw([wide], [g.float()], [m_part], [v_part], [], [state["step"]], **options)
        w.copy_(stochastic_round(wide, generator) if generator is not None and w.dtype == torch.bfloat16 else wide)
    if not p.is_contiguous():
        p.copy_(weight.view(p.shape))
