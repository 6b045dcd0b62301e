"""Steps that an unusable gradient skips: found on the device, by parameter, counted without waiting for it.

A gradient is usable where all of its entries are below ``core.galore.largest_usable``: it is finite, and so are its
second moments.

``state["skipped"]`` of a parameter holds int32 [in a row, in all, longest row].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.core.galore import compute_dtype, largest_usable
from galore_trainer.optim.on_host import OnHost

ROW_LIMIT = 10
"""Steps in a row without a usable gradient that a parameter may have before training is stopped."""

Flag = tuple[MutableMapping[str, Any], Tensor]
"""A parameter's state and a scalar tensor on its device: 1.0 where its gradient was usable, else 0.0."""


def no_skips(device: torch.device) -> Tensor:
    """The counters of a parameter that has skipped nothing."""
    return torch.zeros(3, dtype=torch.int32, device=device)


def usable_flags(grads: Sequence[Tensor]) -> list[Tensor]:
    """1.0 for each usable gradient, else 0.0: float32 scalar tensors, in a few launches a device."""
    flags: list[Any] = [None] * len(grads)
    for (device, wide), members in _alike(grads, lambda x: (x.device, compute_dtype(x.dtype))).items():
        limit = largest_usable(wide)
        if device.type == "cpu" and all(type(grads[i]) is Tensor for i in members):
            for i in members:
                flags[i] = torch.tensor(float(_all_below(grads[i], limit)), dtype=torch.float32, device=device)
            continue
        # an empty gradient has no largest magnitude
        tops = [grads[i] if grads[i].numel() else grads[i].new_zeros(1) for i in members]
        largest = torch.stack(list(torch._foreach_norm(tops, float("inf"), wide)))
        for i, flag in zip(members, (largest < limit).float().unbind(), strict=True):
            flags[i] = flag
    return flags


def _all_below(x: Tensor, limit: float) -> bool:
    """Whether all magnitudes are below a limit, by the fastest passes on a CPU; False for NaN."""
    if x.numel() == 0 or (x.dtype in (torch.float32, torch.float64) and torch.linalg.vector_norm(x).item() < limit):
        return True
    low, high = torch.aminmax(x)
    return -limit < low.item() and high.item() < limit


def count_skips(flags: Sequence[Flag]) -> None:
    """Take one step's flags into the counters."""
    for members in _alike([ok for _, ok in flags], lambda ok: ok.device).values():
        states = [flags[i][0] for i in members]
        bad = 1 - torch.stack([flags[i][1] for i in members]).int()
        in_a_row, total, longest = torch.stack([state["skipped"] for state in states]).unbind(1)
        in_a_row = (in_a_row + 1) * bad
        new = torch.stack([in_a_row, total + bad, torch.maximum(longest, in_a_row)], dim=1)
        for state, counters in zip(states, new.unbind(), strict=True):
            state["skipped"] = counters


def total_skips(counters: Mapping[str, Tensor], culprits: Sequence[str] = ()) -> dict[str, int]:
    """Skipped steps by parameter name (those with any); waits for the device.

    Args:
        counters: by parameter name.
        culprits: names of weights whose own gradients are known to have been unusable, for the error.

    Raises:
        FloatingPointError: a parameter skipped ten steps in a row.
    """
    if not counters:
        return {}
    counts = on_host(counters).tolist()
    check_counts(list(counters), counts, culprits)
    return {name: total for name, (_, total, _) in zip(counters, counts, strict=True) if total}


def some_of(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def on_host(counters: Mapping[str, Tensor], more: Tensor | None = None) -> OnHost:
    """Counters of parameters on their way to the host, [parameters, 3], and one row more."""
    device = next(iter(counters.values())).device
    rows = [*counters.values(), *([] if more is None else [more])]
    return OnHost(torch.stack([row.to(device) for row in rows]))


def is_all_zero(grad: Tensor | None) -> Tensor:
    """int32 [3]: whether a gradient is zero throughout, and two zeros; none is not zero."""
    found = torch.zeros(3, dtype=torch.int32, device="cpu" if grad is None else grad.device)
    if grad is not None and grad.numel():
        found[0] = ~grad.any()
    return found


def check_counts(names: Sequence[str], counts: Sequence[Sequence[int]], culprits: Sequence[str] = ()) -> None:
    """Raise ``FloatingPointError`` where a parameter skipped ten steps in a row; see ``total_skips``."""
    stuck = [name for name, (_, _, longest) in zip(names, counts, strict=True) if longest >= ROW_LIMIT]
    if stuck:
        first = f" It began in the gradients of {some_of(culprits)}, before clipping." if culprits else ""
        raise FloatingPointError(
            f"gradients were not finite, or above {largest_usable(torch.float32):.0e}, in {ROW_LIMIT} steps in a row: "
            f"{some_of(stuck)}.{first} Their weights were left as they were. "
            "Lower the learning rate, look for a bad batch, or train in float32 or bfloat16."
        )


def _alike(tensors: Sequence[Tensor], key: Callable[[Tensor], Any]) -> dict[Any, list[int]]:
    """Places of the tensors that have equal keys."""
    found: dict[Any, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        found[key(tensor)].append(i)
    return found
