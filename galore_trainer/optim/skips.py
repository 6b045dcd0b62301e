"""Steps that a non-finite gradient skips: found on the device, by parameter, counted without waiting for it.

``state["skipped"]`` of a parameter holds int32 [in a row, in all, longest row].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.optim.on_host import OnHost

ROW_LIMIT = 10
"""Steps in a row without a finite gradient that a parameter may have before training is stopped."""
LATER = ROW_LIMIT // 2  # steps after which no device needs to be waited for

Flag = tuple[MutableMapping[str, Any], Tensor]
"""A parameter's state and a scalar tensor on its device: 1.0 where its gradient was finite, else 0.0."""


def no_skips(device: torch.device) -> Tensor:
    """The counters of a parameter that has skipped nothing."""
    return torch.zeros(3, dtype=torch.int32, device=device)


def finite_flags(grads: Sequence[Tensor]) -> list[Tensor]:
    """1.0 for each gradient that holds finite numbers alone, else 0.0: scalar tensors, in a few launches a device."""
    flags: list[Tensor] = [torch.ones(())] * len(grads)
    for device, members in _by_device(grads).items():
        if device.type == "cpu" and all(type(grads[i]) is Tensor for i in members):
            for i in members:
                flags[i] = torch.tensor(float(_all_finite(grads[i])))
            continue
        # the largest magnitude is finite if all are; an empty gradient has none
        tops = [grads[i] if grads[i].numel() else grads[i].new_zeros(1) for i in members]
        wide = any(top.dtype == torch.float64 for top in tops)
        norms = torch._foreach_norm(tops, float("inf"), None if wide else torch.float32)
        largest = torch.stack([norm.float() for norm in norms] if wide else list(norms))
        for i, flag in zip(members, torch.isfinite(largest).float().unbind(), strict=True):
            flags[i] = flag
    return flags


def _all_finite(x: Tensor) -> bool:
    """A finite sum shows it; only where that is none each entry is looked at, as large ones overflow together."""
    return bool(torch.isfinite(x.sum()) or torch.isfinite(x).all())


def count_skips(flags: Sequence[Flag]) -> None:
    """Take one step's flags into the counters."""
    for members in _by_device([ok for _, ok in flags]).values():
        states = [flags[i][0] for i in members]
        bad = 1 - torch.stack([flags[i][1] for i in members]).int()
        in_a_row, total, longest = torch.stack([state["skipped"] for state in states]).unbind(1)
        in_a_row = (in_a_row + 1) * bad
        new = torch.stack([in_a_row, total + bad, torch.maximum(longest, in_a_row)], dim=1)
        for state, counters in zip(states, new.unbind(), strict=True):
            state["skipped"] = counters


class Watch:
    """Looks every so often for parameters that skip all their steps; on an accelerator it has the answer later."""

    def __init__(self) -> None:
        self._asked: tuple[list[str], OnHost] | None = None

    def look(self, step: int, counters: Callable[[], Mapping[str, Tensor]]) -> None:
        """To be called in every step; all processes come to the same answer in the same one.

        Args:
            step: how many there were.
            counters: by parameter name.

        Raises:
            FloatingPointError: a parameter skipped ten steps in a row.
        """
        if step % ROW_LIMIT == 0 and (now := counters()):
            self._asked = list(now), _on_host(now)
        if self._asked is not None and (step % ROW_LIMIT == LATER or not self._asked[1].waits):
            names, counts = self._asked
            self._asked = None
            _check(names, counts.tolist())


def total_skips(counters: Mapping[str, Tensor]) -> dict[str, int]:
    """Skipped steps by parameter name (those with any); waits for the device.

    Raises:
        FloatingPointError: a parameter skipped ten steps in a row.
    """
    if not counters:
        return {}
    counts = _on_host(counters).tolist()
    _check(list(counters), counts)
    return {name: total for name, (_, total, _) in zip(counters, counts, strict=True) if total}


def _on_host(counters: Mapping[str, Tensor]) -> OnHost:
    device = next(iter(counters.values())).device
    return OnHost(torch.stack([counter.to(device) for counter in counters.values()]))


def _check(names: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    stuck = [name for name, (_, _, longest) in zip(names, counts, strict=True) if longest >= ROW_LIMIT]
    if stuck:
        some = ", ".join(stuck[:5]) + (f" and {len(stuck) - 5} more" if len(stuck) > 5 else "")
        raise FloatingPointError(
            f"gradients were not finite in {ROW_LIMIT} steps in a row: {some}. Their weights were left as they were. "
            "Lower the learning rate, look for a bad batch, or train in float32 or bfloat16."
        )


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """Which of the tensors lie on each device."""
    found: dict[torch.device, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        found[tensor.device].append(i)
    return found
