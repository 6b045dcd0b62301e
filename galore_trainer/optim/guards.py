"""What keeps a step safe without making a device wait: usable gradients, skipped steps, failed refreshes, equal bases.

A gradient is usable where all of its entries are below ``core.galore.largest_usable``: it is finite, and so are its
second moments. ``state["skipped"]`` of a parameter holds int32 [in a row, in all, longest row] of skipped steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.core.galore import compute_dtype, largest_usable
from galore_trainer.layouts.shard import Ranks, checksum

ROW_LIMIT = 10
"""Steps in a row without a usable gradient that a parameter may have before training is stopped."""
COMPARE_EVERY = 10  # refreshes of a weight between two comparisons of its bases


class Later:
    """Numbers of a device that the host reads in a later step, so that it need not wait for them."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._copied = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.current_stream(numbers.device).record_event()

    @property
    def waits(self) -> bool:
        """Whether reading may have to wait for a device."""
        return self._copied is not None

    @property
    def ready(self) -> bool:
        """Whether reading does not wait now."""
        return self._copied is None or bool(self._copied.query())

    def tolist(self) -> list[Any]:
        """The numbers; waits until they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        numbers: list[Any] = self._numbers.tolist()
        return numbers


# ---------------------------------------------------------------------- usable gradients


def usable_flags(grads: Sequence[Tensor], *, order: float = float("inf")) -> list[Tensor]:
    """1.0 for each usable gradient, else 0.0: float32 scalar tensors, in a few launches a device.

    Args:
        grads: of any device and dtype.
        order: of the norm that is compared with the limit. The largest entry (infinity) bounds second moments of the
            entries; the Frobenius norm (2) bounds those of every projection, too.
    """
    flags: list[Any] = [None] * len(grads)
    for (device, wide), members in _alike(grads, lambda x: (x.device, compute_dtype(x.dtype))).items():
        limit = largest_usable(wide)
        if device.type == "cpu" and all(type(grads[i]) is Tensor for i in members):
            for i in members:
                usable = _is_below(grads[i], limit, order)
                flags[i] = torch.tensor(float(usable), dtype=torch.float32, device=device)
            continue
        # an empty gradient has no largest magnitude
        filled = [grads[i] if grads[i].numel() else grads[i].new_zeros(1) for i in members]
        norms = torch.stack(list(torch._foreach_norm(filled, order, wide)))
        for i, flag in zip(members, (norms < limit).float().unbind(), strict=True):
            flags[i] = flag
    return flags


def _is_below(x: Tensor, limit: float, order: float) -> bool:
    """Whether a norm is below a limit, by the fastest pass on a CPU; False for NaN."""
    if x.numel() == 0:
        return True
    if order == 2.0 or x.dtype in (torch.float32, torch.float64):
        if torch.linalg.vector_norm(x, dtype=compute_dtype(x.dtype)).item() < limit:  # bounds every entry, too
            return True
        if order == 2.0:
            return False
    low, high = torch.aminmax(x)
    return -limit < low.item() and high.item() < limit


# ---------------------------------------------------------------------- skipped steps


def no_skips(device: torch.device) -> Tensor:
    """The counters of a parameter that has skipped nothing."""
    return torch.zeros(3, dtype=torch.int32, device=device)


def count_skips(states: Sequence[MutableMapping[str, Any]], ok: Tensor) -> None:
    """Take one step into the counters of skipped steps, in place.

    Args:
        states: of parameters on one device.
        ok: [parameters], 1.0 or 0.0.
    """
    counters = [state["skipped"] for state in states]
    bad = 1 - ok.int()
    in_a_row, total, longest = torch.stack(counters).unbind(1)
    in_a_row = (in_a_row + 1) * bad
    new = torch.stack([in_a_row, total + bad, torch.maximum(longest, in_a_row)], dim=1)
    torch._foreach_copy_(counters, list(new.unbind()))


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
    counts = counts_later(counters).tolist()
    check_counts(list(counters), counts, culprits)
    return {name: total for name, (_, total, _) in zip(counters, counts, strict=True) if total}


def counts_later(counters: Mapping[str, Tensor], more: Tensor | None = None) -> Later:
    """Counters of parameters on their way to the host, [parameters, 3], and one row more."""
    device = next(iter(counters.values())).device
    rows = [*counters.values(), *([] if more is None else [more])]
    return Later(torch.stack([row.to(device) for row in rows]))


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


def some_of(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---------------------------------------------------------------------- failed refreshes


class Retries:
    """Refreshes whose success is checked one step later, so that no step waits for the answer.

    A weight whose refresh failed, by its tools or by its gradient, keeps its old basis and is due again, off its grid;
    it is refreshed with the exact method then, if its gradient is usable.
    """

    def __init__(self) -> None:
        self._open: list[tuple[Later, list[MutableMapping[str, Any]]]] = []

    def add(self, states: list[MutableMapping[str, Any]], failed: Tensor) -> None:
        """Check these weights later; ``failed`` [weights] is true where the old basis was kept."""
        self._open.append((Later(failed), states))

    def settle(self) -> None:
        """Read the answers: a weight whose refresh failed is due again."""
        for answers, states in self._open:
            for state, failed in zip(states, answers.tolist(), strict=True):
                if failed:
                    state["due"] = state["calls"]
        self._open.clear()


# ---------------------------------------------------------------------- equal bases


def check_bases(ranks: Ranks, refreshed: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
    """Compare new bases between processes, at the first refresh of a weight and at every tenth.

    Args:
        ranks: the processes.
        refreshed: of each matrix with a new basis: its name, what its keys begin with, its weight's state.

    Raises:
        RuntimeError: on every process, if one has another basis; the first matrix is named.
    """
    compared = [matrix for matrix in refreshed if matrix[2]["refreshes"] % COMPARE_EVERY == 1]
    if not compared:
        return
    bad = ranks.differing(torch.stack([checksum(state[f"{prefix}basis"]) for _, prefix, state in compared]))
    if bad.any():
        names = [name for (name, _, _), differs in zip(compared, bad.tolist(), strict=True) if differs]
        raise RuntimeError(
            f"the processes have found different bases for {names[0]} (and {len(names) - 1} more matrices): their "
            "gradients, weights or random streams are no longer equal. Give every process the same seed and weights, "
            "and the same type of device."
        )


def _alike(tensors: Sequence[Tensor], key: Callable[[Tensor], Any]) -> dict[Any, list[int]]:
    """Positions of the tensors that have equal keys."""
    positions: dict[Any, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        positions[key(tensor)].append(i)
    return positions
