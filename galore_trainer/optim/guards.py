"""What keeps training safe without making a device wait: unusable gradients, failed refreshes, unequal bases.

A gradient is usable where all of its entries are below ``core.galore.largest_usable``: it is finite, and so are its
second moments. ``state["skipped"]`` of a parameter holds int32 [in a row, in all, longest row] of skipped steps.
"""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.core.galore import compute_dtype, largest_usable
from galore_trainer.layouts.find import is_cut, local
from galore_trainer.layouts.shard import Ranks, checksum

ROW_LIMIT = 10
"""Steps in a row without a usable gradient that a parameter may have before training is stopped."""
COMPARE_EVERY = 10  # refreshes of a weight between two comparisons of its bases
ASKED = (0, 7)  # steps of each ten; where ten in a row began with the first, its culprit can still be found
LATER = 5  # steps of each ten, and the tenth: an accelerator has answered by then, and all processes act together
ZEROS = 2  # answers in a row in which all gradients may be zero
logger = logging.getLogger(__name__)
Leaves = Callable[[], Iterable[tuple[str, Tensor]]]


class Later:
    """Numbers of a device that the host reads later, so that it need not wait for them now."""

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
        for i, flag in zip(members, usable_norms(torch._foreach_norm(filled, order, wide)), strict=True):
            flags[i] = flag
    return flags


def usable_norms(norms: Sequence[Tensor]) -> list[Tensor]:
    """1.0 for each norm, a scalar tensor in ``compute_dtype``, of a usable gradient, else 0.0; see ``usable_flags``."""
    flags: list[Any] = [None] * len(norms)
    for (_, dtype), members in _alike(norms, lambda x: (x.device, x.dtype)).items():
        below = torch.stack([norms[i] for i in members]) < largest_usable(dtype)  # False for NaN
        for i, flag in zip(members, below.float().unbind(), strict=True):
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


# ---------------------------------------------------------------------- whose gradients were bad


class Watch:
    """Reads the counters of skipped steps, finds out whose gradients were bad, and stops a run that stands still.

    Args:
        skipped: steps that were skipped before, of all parameters together.
    """

    def __init__(self, skipped: int = 0) -> None:
        self.culprits = Culprits()
        self._skipped, self._zeros, self._asks_why_zero = skipped, 0, True
        self._named: set[str] = set()
        self._asked: tuple[list[str], Later, Any] | None = None
        self._counts: tuple[list[str], list[list[int]]] | None = None

    def look(
        self,
        step: int,
        counters: Callable[[], Mapping[str, Tensor]],
        leaves: Leaves,
        smallest: Callable[[], Tensor | None],
        skips: bool,
    ) -> None:
        """To be called in every step; all processes come to the same end in the same one.

        Args:
            step: how many there were.
            counters: of skipped steps, by parameter name.
            leaves: name and tensor of every weight, as autograd knows it.
            smallest: the gradient with the fewest entries; it is zero where clipping by an infinite norm made all so.
            skips: whether this step is known to have skipped a parameter.

        Raises:
            FloatingPointError: a parameter skipped ten steps in a row.
        """
        if self._asked is not None and (self._asked[1].ready or step % LATER == 0):
            self._read(leaves)
        if (skips or step % ROW_LIMIT in ASKED) and self._asked is None and (now := counters()):
            numbers = counts_later(now, is_all_zero(smallest()))
            self._asked = list(now), numbers, self.culprits.ask()
            if not numbers.waits:
                self._read(leaves)
        if step % LATER == 0 and self._counts is not None:
            check_counts(*self._counts, self.culprits.names)

    def _read(self, leaves: Leaves) -> None:
        """Take the answer in: name what is new, look at gradients where that can find a culprit."""
        assert self._asked is not None
        (names, numbers, asked), self._asked = self._asked, None
        *counts, (zero, _, _) = numbers.tolist()
        self._zeros = self._zeros + 1 if zero else 0
        skipped = sum(total for _, total, _ in counts)
        if skipped > self._skipped:
            new = [name for name, (_, total, _) in zip(names, counts, strict=True) if total and name not in self._named]
            self._tell(new)
        zeros = self._asks_why_zero and self._zeros >= ZEROS
        if skipped > self._skipped or zeros:
            if guilty := self.culprits.take_in(asked):
                limit = largest_usable(torch.float32)
                logger.warning(
                    "the gradient of %s was not finite or above %.0e: its step was skipped, or clipping by its norm "
                    "made all gradients NaN or zero",
                    some_of(guilty),
                    limit,
                )
                self.culprits.disarm()
                self._zeros = 0
            elif not self.culprits.armed:
                self.culprits.arm(leaves())
            elif not self._named:  # no step was skipped, and no gradient was bad: this one is zero for its own reasons
                self._asks_why_zero = False
                self.culprits.disarm()
        self._skipped, self._counts = skipped, (names, counts)
        if any(longest >= ROW_LIMIT for _, _, longest in counts):
            self.culprits.take_in(self.culprits.ask())

    def _tell(self, new: list[str]) -> None:
        if new:
            logger.warning(
                "skipped a step of %s: gradients that are not finite, or above %.0e; from now on gradients are looked "
                "at before clipping, to name the first",
                some_of(new),
                largest_usable(torch.float32),
            )
            self._named.update(new)


def is_all_zero(grad: Tensor | None) -> Tensor:
    """int32 [3]: whether a gradient is zero throughout, and two zeros; None counts as not zero."""
    numbers = torch.zeros(3, dtype=torch.int32, device="cpu" if grad is None else grad.device)
    if grad is not None and grad.numel():
        numbers[0] = ~grad.any()
    return numbers


class Culprits:
    """Looks at gradients as backward makes them, from ``arm`` to ``disarm``; otherwise it does nothing.

    ``Watch`` arms it after a skipped step, or where clipping may have made gradients zero. Each process looks at its
    own gradients.

    Attributes:
        names: of weights whose own gradients were unusable, in the order in which that was seen.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._hooks: list[Any] = []
        self._bad: dict[str, Tensor] = {}  # 1.0 where a gradient has been unusable since the hooks are there

    @property
    def armed(self) -> bool:
        """Whether gradients are looked at."""
        return bool(self._hooks)

    def arm(self, leaves: Iterable[tuple[str, Tensor]]) -> None:
        """Look at the gradients of these weights from the next backward on.

        Args:
            leaves: name and tensor of each weight, as autograd knows them.
        """
        reference = weakref.ref(self)
        for name, p in leaves:
            if not p.requires_grad:
                continue

            def look(grad: Tensor, name: str = name) -> None:
                watching = reference()
                if watching is not None:
                    watching._note(name, grad)

            if is_cut(p):  # FSDP2 computes with other tensors, and calls these hooks itself
                self._hooks.append(p.register_post_accumulate_grad_hook(lambda p, look=look: look(p.grad)))
            else:
                self._hooks.append(p.register_hook(look))

    def disarm(self) -> None:
        """Look at no gradient any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._bad = [], {}

    def ask(self) -> tuple[list[str], Later] | None:
        """What was seen since ``arm``: names, and on its way to the host whether each was bad; None for nothing."""
        if not self._bad:
            return None
        device = next(iter(self._bad.values())).device
        return list(self._bad), Later(torch.stack([bad.to(device) for bad in self._bad.values()]))

    def take_in(self, asked: tuple[list[str], Later] | None) -> list[str]:
        """Names of the weights that an answer of ``ask`` finds guilty; they are added to ``names``."""
        guilty = [name for name, bad in zip(asked[0], asked[1].tolist(), strict=True) if bad] if asked else []
        self.names += [name for name in guilty if name not in self.names]
        return guilty

    @torch.no_grad()
    def _note(self, name: str, grad: Tensor) -> None:
        bad = 1.0 - usable_flags([local(grad)])[0]
        before = self._bad.get(name)
        self._bad[name] = bad if before is None else torch.maximum(before, bad)


# ---------------------------------------------------------------------- failed refreshes


class Retries:
    """Refreshes whose success is checked one step later, so that no step waits for the answer.

    A weight whose refresh failed, by its tools or by its gradient, keeps its old basis and is due again, off its grid;
    its basis is found again with tools that cannot fail then, if its gradient is usable.
    """

    def __init__(self) -> None:
        self._open: list[tuple[Later, list[MutableMapping[str, Any]]]] = []

    def __bool__(self) -> bool:
        return bool(self._open)  # whether there are answers to read

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


def compare_bases(refreshed: Iterable[tuple[Ranks | None, str, Tensor, int]]) -> None:
    """Compare new bases between processes, at the first refresh of a weight and at every tenth.

    Args:
        refreshed: of each matrix with a new basis: the processes that hold its weight too, if any; its name; its stored
            basis; how many refreshes it had.

    Raises:
        RuntimeError: on every process, if one has another basis; the first matrix is named.
    """
    by_ranks: dict[Ranks, list[tuple[str, Tensor]]] = {}
    for ranks, name, basis, refreshes in refreshed:
        if ranks is not None and refreshes % COMPARE_EVERY == 1:
            by_ranks.setdefault(ranks, []).append((name, checksum(basis)))
    for ranks, compared in by_ranks.items():
        differs = ranks.differing(torch.stack([sum_of_bits for _, sum_of_bits in compared]))
        if differs.any():
            names = [name for (name, _), bad in zip(compared, differs.tolist(), strict=True) if bad]
            raise RuntimeError(
                f"the processes have found different bases for {names[0]} (and {len(names) - 1} more matrices): their "
                "gradients, weights or random streams are no longer equal. Give every process the same seed and "
                "weights, and the same type of device."
            )


def _alike(tensors: Sequence[Tensor], key: Callable[[Tensor], Any]) -> dict[Any, list[int]]:
    """Positions of the tensors that have equal keys."""
    positions: dict[Any, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        positions[key(tensor)].append(i)
    return positions
