"""AdamW for what is not projected: torch's fused function; moments in 32, 16 or 8 bits; bf16 weights as elsewhere."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from galore_trainer.core.galore import compute_dtype, stochastic_round
from galore_trainer.core.precision import BLOCK, NOISE, Stored, decode, encode, zero_code
from galore_trainer.optim.stack import MOMENTS

CHUNK = 1 << 22  # entries that are widened at a time, where weight, gradient or moments are stored otherwise


class PlainJob(NamedTuple):
    """One parameter that is not projected, in one step: what ``plain_step`` takes, and its name."""

    p: Tensor
    grad: Tensor
    name: str
    group: dict[str, Any]
    ok: Tensor
    state: MutableMapping[str, Any]


def plain_state(p: Tensor, bits: int = 32) -> dict[str, Any]:
    """Fresh moments of a parameter in ``bits`` bits (of a float64 one in float64 for 32); 8 bits have scales too."""
    dtype = {32: compute_dtype(p.dtype), 16: torch.bfloat16, 8: torch.uint8}[bits]
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
    for key, signed in MOMENTS:
        state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        if bits == 8:
            state[key].fill_(zero_code(signed=signed))
            state[f"{key}_scale"] = torch.zeros(-(-p.numel() // BLOCK), dtype=torch.float32, device=p.device)
    return state


def plain_step(
    p: Tensor,
    grad: Tensor,
    state: MutableMapping[str, Any],
    group: dict[str, Any],
    ok: Tensor,
    rounding: torch.Generator | None,
    noise: torch.Generator | None = None,
) -> None:
    """One AdamW step in place.

    Args:
        p: parameter of any shape and strides. A contiguous one is updated directly where it, its gradient and its
            moments have its ``compute_dtype``; all else goes through chunks of that dtype.
        grad: its gradient, of any strides.
        state: from ``plain_state``.
        group: gives lr, betas, eps and weight_decay.
        ok: scalar tensor, 1.0, or 0.0 to leave everything as it is.
        rounding: for stochastic rounding of bf16 weights; None rounds to nearest.
        noise: for the rounding of moments in fewer than 32 bits.
    """
    options = dict(
        found_inf=1.0 - ok, fused=True, amsgrad=False, maximize=False, beta1=group["betas"][0], beta2=group["betas"][1],
        lr=float(group["lr"]), weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip
    wide = compute_dtype(p.dtype)
    grad = grad.contiguous()  # torch's fused function reads its arguments in memory order, whatever their strides
    if p.dtype == grad.dtype == state["exp_avg"].dtype == wide and p.is_contiguous():
        adamw([p], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], **options)
        return
    before = state["step"].clone()
    weight, gradient = p.contiguous().view(-1), grad.view(-1)
    state["step"].add_(ok)  # also where this process has no entry
    for start in range(0, p.numel(), CHUNK):
        here = slice(start, start + CHUNK)
        state["step"].copy_(before)
        stored = [_chunk(state, key, here) for key, _ in MOMENTS]
        new = weight[here].to(wide)
        m, v = (decode(x, signed=signed)[0].to(wide) for x, (_, signed) in zip(stored, MOMENTS, strict=True))
        adamw([new], [gradient[here].to(wide)], [m], [v], [], [state["step"]], **options)
        weight[here] = stochastic_round(new, rounding) if rounding is not None and p.dtype == torch.bfloat16 else new
        if state["exp_avg"].dtype != wide:
            for old, moment, (_, signed) in zip(stored, (m, v), MOMENTS, strict=True):
                _replace_(old, moment.unsqueeze(0), signed, ok, noise)
    if not p.is_contiguous():
        p.copy_(weight.view(p.shape))


def _chunk(state: MutableMapping[str, Any], key: str, here: slice) -> Stored:
    """A part of a stored moment, [1, entries]: views."""
    scale = state.get(f"{key}_scale")
    blocks = slice(here.start // BLOCK, here.stop // BLOCK)
    return Stored(state[key].view(1, -1)[:, here], None if scale is None else scale.view(1, -1)[:, blocks])


def _replace_(old: Stored, x: Tensor, signed: bool, ok: Tensor, noise: torch.Generator | None) -> None:
    """Store new numbers in place; where ``ok`` is 0 what is stored stays, bit for bit."""
    bits = 8 * old.values.element_size()
    drawn = torch.randint(0, NOISE, x.shape, generator=noise, device=x.device, dtype=torch.int32)
    new = encode(x, bits, drawn, signed=signed)
    old.values.copy_(torch.where(ok > 0.0, new.values, old.values))
    if old.scale is not None and new.scale is not None:
        old.scale.copy_(torch.where(ok > 0.0, new.scale, old.scale))
