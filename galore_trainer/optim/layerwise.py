"""Layer-wise mode: a projected weight's gradient is taken in as soon as backward has made it, and freed.

A hook puts a ``ProjectedGradient`` in the place of the dense ``.grad``. What it keeps is linear in the gradient, so
micro-batches add up to what the whole batch would have given; its norm and its scaling answer to
``clip_grad_norm_``, so that clipping and a logged gradient norm stay what they were. Only a weight whose refresh is
due in this step keeps its dense gradient; refreshes are spread over the gap, so these are few.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.core.galore import compute_dtype
from galore_trainer.errors import OptionError
from galore_trainer.layouts.shard import Ranks, checksum
from galore_trainer.optim.bucket import runs
from galore_trainer.optim.guards import usable_flags
from galore_trainer.optim.kept import KeptGradient, KeptWhole, energies, norms_of_tensors

BUCKET = 1 << 25  # entries that travel together
Kept = KeptGradient | KeptWhole
aten = torch.ops.aten
ADDITIONS = (aten.add_.Tensor, aten.add.Tensor)
PRODUCTS, QUOTIENTS = (aten.mul_.Tensor, aten.mul_.Scalar), (aten.div_.Tensor, aten.div_.Scalar)
NORM, ZERO, DETACH = aten.linalg_vector_norm.default, aten.zero_.default, aten.detach.default
_COPIED: dict[str, Any] = {}  # the newest factor, its version, and its copy


class ProjectedGradient(torch.Tensor):
    """The ``.grad`` of a projected weight in layer-wise mode: shape, dtype and device of the weight, no dense storage.

    It knows what autograd, gradient clipping and ``zero_grad`` ask of a gradient: to be added to, its 2-norm, to be
    scaled, to be zeroed. Anything else raises and says so.

    Attributes:
        parts: one for each logical matrix; or one ``KeptWhole``, where processes average and the step needs all of it.
        averaged: whether it is the mean over processes already.
    """

    parts: Sequence[Kept]

    @staticmethod
    def __new__(cls, grad: Tensor, name: str, parts: Sequence[Kept], averager: Any = None) -> ProjectedGradient:
        """A wrapper like ``grad``."""
        return torch.Tensor._make_wrapper_subclass(cls, grad.shape, dtype=grad.dtype, device=grad.device)

    def __init__(self, grad: Tensor, name: str, parts: Sequence[Kept], averager: Any = None) -> None:
        self.parts, self._name = parts, name
        self.averaged, self._average = False, averager
        self._batches = 0
        self._exact: Tensor | None = None  # norm of a single backward's gradient; of a mean over processes nobody knows
        if averager is None:
            self._exact = torch.linalg.vector_norm(grad, dtype=compute_dtype(grad.dtype))
        self._factor: Tensor | float | None = None  # of the exact norm
        self.estimate: Tensor | None = None  # of the norm, while it is known
        self.take_in(grad)

    def take_in(self, grad: Tensor) -> None:
        """Add one micro-batch's gradient."""
        if self._average is not None:
            self._average.note(self)
        self.estimate = None
        for part in self.parts:
            part.take_in(grad if isinstance(part, KeptWhole) else part.matrix.take(grad))
        self._batches += 1

    def frobenius(self) -> Tensor:
        """The gradient's norm: exact for a single backward of one process, else estimated, see ``energies``."""
        self.settle()
        if self._batches == 1 and self._exact is not None:
            return self._exact if self._factor is None else (self._exact * self._factor).abs()
        if self.estimate is None and self._average is not None:
            self._average.measure()
        elif self.estimate is None:
            measure_together([self])
        assert self.estimate is not None
        return self.estimate

    @property
    def whole(self) -> Tensor | None:
        """All of the gradient, where it was kept."""
        part = self.parts[0]
        return part.value if isinstance(part, KeptWhole) else None

    def kept(self) -> list[tuple[str, Tensor]]:
        """Everything that is kept, by kind."""
        return [pair for part in self.parts for pair in part.kept()]

    def settle(self) -> None:
        """Average over processes, if that is still to be done: all gradients at once, on all of them."""
        if self._average is not None:
            self._average.settle()

    def scale_(self, factor: Tensor | float) -> ProjectedGradient:
        """Multiply by a number, as clipping does."""
        factor = _copy_of(factor) if isinstance(factor, Tensor) else factor
        self.estimate = None
        for part in self.parts:
            part.scale_(factor)
        self._factor = factor if self._factor is None else self._factor * factor
        return self

    def clear(self) -> ProjectedGradient:
        """Set the gradient to zero."""
        for part in self.parts:
            part.clear()
        self.estimate = self._factor = None
        if self._exact is not None:
            self._exact = torch.zeros_like(self._exact)
        return self

    def usable(self) -> Tensor:
        """Scalar tensor: 1.0 where moments can take the gradient in, else 0.0; see ``core.galore.largest_usable``."""
        return torch.stack([part.usable() for part in self.parts]).all().float()

    def __repr__(self) -> str:  # type: ignore[override]
        """Name and shape: there are no entries to show."""
        return f"ProjectedGradient({self._name}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """The few operations of a gradient that is accumulated, clipped and zeroed."""
        first = args[0]
        if func in ADDITIONS and not kwargs:
            mine, other = (first, args[1]) if isinstance(first, cls) else (args[1], first)
            if not isinstance(other, cls) and other.shape == mine.shape:
                mine.take_in(other)
                return mine
        elif func is NORM and len(args) < 3 and (len(args) == 1 or args[1] == 2):
            return first.frobenius()
        elif func in PRODUCTS and isinstance(first, cls) and _is_number(args[1]):
            return first.scale_(args[1])
        elif func in QUOTIENTS and isinstance(first, cls) and _is_number(args[1]):
            return first.scale_(1.0 / args[1])
        elif func is ZERO:
            return first.clear()
        elif func is DETACH:
            return first
        raise RuntimeError(
            f"{func} was asked of a gradient that layer-wise mode does not keep whole, {mine_of(args)!r}. It can be "
            "accumulated, clipped by its 2-norm, scaled and zeroed; for anything else train without galore.layerwise."
        )


def measure_together(grads: Iterable[ProjectedGradient]) -> None:
    """Estimate the norms that are not known, in few operations for all of them."""
    asked = [grad for grad in grads if grad.estimate is None]
    squares = iter(energies([part for grad in asked for part in grad.parts]))
    of_parts = [[next(squares) for _ in grad.parts] for grad in asked]
    totals = [parts[0] if len(parts) == 1 else torch.stack(parts).sum() for parts in of_parts]
    for device in dict.fromkeys(total.device for total in totals):
        here = [i for i, total in enumerate(totals) if total.device == device]
        for i, norm in zip(here, torch.stack([totals[i] for i in here]).sqrt().unbind(), strict=True):
            asked[i].estimate = norm


def _is_number(factor: Any) -> bool:
    return not isinstance(factor, Tensor) or factor.numel() == 1


def _copy_of(factor: Tensor) -> Tensor:
    """A number that nobody else changes before it is multiplied by; one for all gradients that share a factor."""
    if factor.is_inference():
        return factor.clone()
    if _COPIED.get("of") is not factor or _COPIED["version"] != factor._version:
        _COPIED.update(of=factor, version=factor._version, copy=factor.clone())
    copy: Tensor = _COPIED["copy"]
    return copy


def mine_of(args: Any) -> Any:
    """The first ``ProjectedGradient`` among the arguments of an operation."""
    flat = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
    return next((x for x in flat if isinstance(x, ProjectedGradient)), None)


def attach(
    p: Tensor, name: str, take: Callable[[Tensor], ProjectedGradient | None]
) -> torch.utils.hooks.RemovableHandle:
    """Let backward hand the gradient of ``p`` to ``take``, and put what comes back in its place.

    Args:
        p: a parameter that requires a gradient.
        name: its name, for errors.
        take: gets ``p``, whose ``.grad`` is dense; None leaves it as it is.

    Raises:
        OptionError: something else has a hook there, and would look for a dense gradient.
    """
    taken = getattr(p, "_post_accumulate_grad_hooks", None)
    if taken:
        ours = any(getattr(hook, "of_galore", False) for hook in taken.values())
        way_out = (
            "Another layer-wise optimizer, offloading or FSDP takes its gradient: remove it, or do without this mode."
        )
        if ours:
            way_out = "A layer-wise GaLoreAdamW built before takes its gradient: delete it, and its Trainer, first."
        got = f"{name}, which has a post-accumulate-grad hook"
        raise OptionError("galore.layerwise", got, "weights that nobody else hooks", way_out)

    @torch._disable_dynamo
    def hook(p: Tensor) -> None:
        if p.grad is not None and not isinstance(p.grad, ProjectedGradient):
            kept = take(p)
            if kept is not None:
                p.grad = kept

    hook.of_galore = True  # type: ignore[attr-defined]
    return p.register_post_accumulate_grad_hook(hook)


def attach_group(optimizer: Any, place: int) -> None:
    """Hook every trained parameter of a projected group for as long as its ``GaLoreAdamW`` lives.

    Args:
        optimizer: its ``keep_gradient`` gets each gradient.
        place: of the group among its ``param_groups``; ``load_state_dict`` puts a new mapping there.
    """
    reference, group = weakref.ref(optimizer), optimizer.param_groups[place]
    for i, (p, name) in enumerate(zip(group["params"], group["names"], strict=True)):

        def take(_: Tensor, i: int = i) -> ProjectedGradient | None:
            living = reference()
            return None if living is None else living.keep_gradient(living.param_groups[place], i)

        if p.requires_grad:
            weakref.finalize(optimizer, attach(p, name, take).remove)


def is_usable(grad: Tensor) -> Tensor:
    """Scalar tensor: 1.0 where moments can take in a gradient, whole or projected, else 0.0."""
    if isinstance(grad, ProjectedGradient):
        return grad.usable()
    return usable_flags([grad])[0]


def norms_of(grads: Sequence[Tensor]) -> list[Tensor]:
    """The Frobenius norms of gradients, whole or projected, in their ``compute_dtype``."""
    known = iter(norms_of_tensors([g for g in grads if not isinstance(g, ProjectedGradient)]))
    return [g.frobenius() if isinstance(g, ProjectedGradient) else next(known) for g in grads]


def is_zero(grad: Tensor) -> bool:
    """Whether every number of a gradient is zero; waits for the device."""
    return not (grad.frobenius() if isinstance(grad, ProjectedGradient) else grad).any().item()


def drop_projected(parameters: Iterable[Tensor]) -> None:
    """Set gradients to None that are projected: a step has used them, and the state they fit is gone."""
    for p in parameters:
        if isinstance(p.grad, ProjectedGradient):
            p.grad = None


# ---------------------------------------------------------------------- several processes with equal weights (DDP)


class Averager:
    """Averages the gradients that layer-wise mode keeps.

    Args:
        ranks: the processes.
        weights: name and tensor of every projected weight, on every process the same ones in the same order.

    Attributes:
        sent: bytes handed to all-reduce by this process so far, by kind: sketch, projected, sampled, along, whole.
    """

    def __init__(self, ranks: Ranks, weights: Callable[[], list[tuple[str, Tensor]]]) -> None:
        self.ranks, self._weights = ranks, weights
        self.sent: dict[str, int] = defaultdict(int)
        self._pending = False
        self._checked = False

    def note(self, grad: ProjectedGradient) -> None:
        """A backward has made or changed a gradient.

        Raises:
            RuntimeError: it had been averaged already.
        """
        if grad.averaged:
            raise RuntimeError(
                "backward ran after the gradients of a step had been averaged over processes (their norm was asked "
                "for, or they were clipped): call step() or zero_grad() first."
            )
        self._pending = True

    def settle(self) -> None:
        """Average what is pending; every process calls this at the same time.

        Raises:
            RuntimeError: processes began with different weights, or one has a gradient where another has none.
        """
        if not self._pending:
            return
        self._pending = False
        named = self._weights()
        if not self._checked:
            self._checked = True
            self._refuse(named, self.ranks.differing(torch.stack([checksum(p) for _, p in named])), "other weights")
        there = torch.tensor([p.grad is not None for _, p in named], dtype=torch.int64, device="cpu")
        self._refuse(named, self.ranks.hosts.differing(there), "no gradient where another has one")
        by_dtype: dict[torch.dtype, list[tuple[str, Tensor]]] = defaultdict(list)
        for grad in projected_gradients(named):
            grad.averaged = True
            by_dtype[grad.dtype if grad.dtype == torch.bfloat16 else compute_dtype(grad.dtype)] += grad.kept()
        for wire, tensors in by_dtype.items():
            for bucket in runs(tensors, lambda pair: pair[1].numel(), BUCKET):
                self._reduce(bucket, wire)

    def measure(self) -> None:
        """Estimate the norms of all gradients, which were averaged, together."""
        measure_together(projected_gradients(self._weights()))

    def _reduce(self, bucket: list[tuple[str, Tensor]], wire: torch.dtype) -> None:
        tensors = [x for _, x in bucket]
        flat = torch.empty(sum(x.numel() for x in tensors), dtype=wire, device=tensors[0].device)
        for kind, x in bucket:
            self.sent[kind] += x.numel() * flat.element_size()
        torch._foreach_copy_(_like(tensors, flat), tensors)
        torch._foreach_copy_(tensors, _like(tensors, self.ranks.sum(flat)))
        torch._foreach_div_(tensors, self.ranks.count)

    def _refuse(self, named: list[tuple[str, Tensor]], bad: Tensor, what: str) -> None:
        if bad.any():
            names = [name for (name, _), differs in zip(named, bad.tolist(), strict=True) if differs]
            raise RuntimeError(
                f"layer-wise mode under DDP: one process has {what}, in {names[0]} and {len(names) - 1} more. Load the "
                "same weights on every process, and let every weight take part in every forward, or train without "
                "galore.layerwise."
            )


def projected_gradients(named: Sequence[tuple[str, Tensor]]) -> list[ProjectedGradient]:
    """The projected gradients of named weights."""
    return [p.grad for _, p in named if isinstance(p.grad, ProjectedGradient)]


def _like(tensors: Sequence[Tensor], flat: Tensor) -> list[Tensor]:
    """Parts of a flat tensor, one after the other, in the shapes of some tensors."""
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
