"""What layer-wise mode keeps of a gradient: all of it linear, so that micro-batches add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.basis import sketch_width
from galore_trainer.core.galore import compute_dtype, project, usable_parts, widen
from galore_trainer.core.matrix import LogicalMatrix, Side
from galore_trainer.core.precision import Stored, decode_basis
from galore_trainer.core.sparse import Support, read_at
from galore_trainer.optim.skips import usable_flags
from galore_trainer.optim.streams import stream

SUPPORTS = ("residual_index", "candidate_index")
"""Keys of the positions at which the residual wants the gradient, the newer first."""
TOGETHER = 1 << 24  # entries of projections and bases that are copied, so that energies are found together
ACROSS: dict[str, Side] = {"right": "left", "left": "right"}


def width_of_sketch(matrix: LogicalMatrix, config: GaLoreConfig, m: int, n: int) -> int:
    """Columns of the test matrix for m x n rows that give a basis of this matrix."""
    return sketch_width(matrix.rank, config.resolved_oversampling(matrix.rank), m, n)


def sketch_matrices(matrix: LogicalMatrix, config: GaLoreConfig, seed: int, name: str, device: torch.device) -> Tensor:
    """Gaussian matrices for ``sketch``: [blocks, rows, k] (right) or [blocks, n, k] (left)."""
    k = width_of_sketch(matrix, config, matrix.block_rows, matrix.columns)
    length = matrix.block_rows if matrix.side == "right" else matrix.columns
    draws = (stream(device, seed, name, "sketch", b) for b in range(matrix.blocks))
    return torch.stack([torch.randn(length, k, generator=g, dtype=torch.float32, device=device) for g in draws])


def sketch(G: Tensor, T: Tensor, side: str) -> Tensor:
    """T^T G [blocks, k, n] (right) or G T [blocks, rows, k] (left), widened: linear in G, and enough for a basis."""
    return project(G, T, ACROSS[side])


class Directions:
    """A random direction for each matrix and step; those of one length are drawn together, and kept for the step."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[Any, ...], tuple[int, Tensor]] = {}

    def of(self, matrix: LogicalMatrix, row: int, rows: int, seed: int, calls: int, like: Tensor) -> Tensor:
        """Gaussian numbers along the projected side, [1, n or block rows, 1], in the dtype of the gradient.

        Args:
            matrix: whose gradient is followed.
            row, rows: the place of its weight among how many.
            seed: of the run.
            calls: steps of this weight before.
            like: the gradient.
        """
        length = matrix.columns if matrix.side == "right" else matrix.block_rows
        key = (matrix.label, length, like.dtype, like.device)
        drawn = self._drawn.get(key)
        if drawn is None or drawn[0] != calls or len(drawn[1]) != rows:
            generator = stream(like.device, seed, matrix.label, "direction", calls, length)
            numbers = torch.randn(rows, length, 1, generator=generator, dtype=torch.float32, device=like.device)
            drawn = self._drawn[key] = calls, numbers.to(like.dtype)
        return drawn[1].narrow(0, row, 1)


class Part:
    """What is kept of the gradient of one logical matrix, all of it linear in the gradient.

    Args:
        matrix: where it lies, and how it is projected.
        state: of its weight.
        sketches: gives the matrices of ``sketch``, while there is no basis.
        direction: see ``Directions``; None while there is no basis.

    Attributes:
        sketch: before the first basis, see ``sketch``; else None.
        projected: R, in the shape of the moments; None before the first basis.
        sampled: G at the residual's candidates or support, None while there are none.
        factor: what these, and what else is kept, are still to be multiplied by; None is 1.
    """

    def __init__(
        self, matrix: LogicalMatrix, state: dict[str, Any], sketches: Callable[[], Tensor], direction: Tensor | None
    ) -> None:
        prefix = matrix.prefix
        self.matrix = matrix
        self._basis = Stored(state[f"{prefix}basis"], state.get(f"{prefix}basis_scale"))
        self.sketch: Tensor | None = None
        self.projected: Tensor | None = None
        self.sampled: Tensor | None = None
        self.factor: Tensor | float | None = None
        self._sketches = sketches
        positions = next((state[prefix + key] for key in SUPPORTS if prefix + key in state), None)
        self._support = None if positions is None else Support(positions, matrix.columns)
        self._direction = direction
        self._along: Tensor | None = None  # G times the direction, across the projected side

    def take_in(self, G: Tensor) -> None:
        """Add one micro-batch's gradient, [blocks, rows, n]."""
        side = self.matrix.side
        self.settle_factor()
        if self._direction is None:
            self.sketch = _plus(self.sketch, sketch(G, self._sketches(), side))
            return
        self.projected = _plus(self.projected, project(G, decode_basis(self._basis), side))
        self._along = _plus(self._along, project(G, self._direction.expand(len(G), -1, -1), side))
        if self._support is not None:
            self.sampled = _plus(self.sampled, widen(read_at(G, self._support)))

    def scale_(self, factor: Tensor | float) -> None:
        """Multiply the gradient by a number; nothing is done on the device before the product is needed."""
        self.factor = factor if self.factor is None else self.factor * factor

    def settle_factor(self) -> None:
        """Multiply what is kept by what it is still to be multiplied by."""
        if self.factor is not None:
            for kept in self._kept().values():
                kept.mul_(self.factor)
            self.factor = None

    def clear(self) -> None:
        """Set the gradient to zero."""
        self.factor = None
        for kept in self._kept().values():
            kept.zero_()

    def kept(self) -> list[tuple[str, Tensor]]:
        """Everything that is kept, by kind."""
        self.settle_factor()
        return list(self._kept().items())

    def _kept(self) -> dict[str, Tensor]:
        kinds = {
            "sketch": self.sketch, "projected": self.projected, "sampled": self.sampled, "along": self._along,
        }  # fmt: skip
        return {kind: x for kind, x in kinds.items() if x is not None}

    def form(self) -> tuple[Any, ...]:
        """Equal for parts whose energies are found together."""
        self.settle_factor()
        if self.sketch is not None:
            return ("sketch", self.sketch.shape[-2 if self.matrix.side == "right" else -1], self.sketch.device)
        assert self.projected is not None
        R, stored = self.projected, self._basis.values
        return (self.matrix.side, R.shape, stored.shape, stored.dtype, R.device)

    @property
    def copied(self) -> int:
        """Entries of what is joined with that of other parts: projection and basis."""
        assert self.projected is not None
        return self.projected.numel() + self._basis.values.numel()

    def seen(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Basis and direction in the dtype of R, [blocks, ...], R, and G along the direction."""
        assert self.projected is not None
        assert self._along is not None
        assert self._direction is not None
        P = decode_basis(self._basis).to(self.projected.dtype)
        return P, self._direction.to(P.dtype).expand(len(P), -1, -1), self.projected, self._along

    def usable(self) -> Tensor:
        """Whether moments can take the gradient in: a scalar tensor, boolean."""
        self.settle_factor()
        kept = self.sketch if self.sketch is not None else self.projected
        assert kept is not None
        return usable_parts(kept, 1)[0] > 0.0


class Whole:
    """All of a gradient, where the next step needs it: what ``Part`` is elsewhere, for the whole stored weight."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def take_in(self, G: Tensor) -> None:
        """Add one micro-batch's gradient."""
        self.value = _plus(self.value, G)

    def scale_(self, factor: Tensor | float) -> None:
        """Multiply the gradient by a number."""
        self._value.mul_(factor)

    def clear(self) -> None:
        """Set the gradient to zero."""
        self._value.zero_()

    def kept(self) -> list[tuple[str, Tensor]]:
        """Everything that is kept, by kind."""
        return [("whole", self._value)]

    def form(self) -> tuple[Any, ...]:
        """As of a ``Part``."""
        return ("whole", self._value.dtype, self._value.device)

    def usable(self) -> Tensor:
        """Whether moments can take the gradient in: a scalar tensor, boolean."""
        return usable_flags([self._value])[0] > 0.0

    @property
    def _value(self) -> Tensor:
        assert self.value is not None
        return self.value


def energies(parts: Sequence[Part | Whole]) -> list[Tensor]:
    """Squared Frobenius norms of gradients of which parts were kept, scalars: unbiased estimates.

    With a basis the projected part is known, and what it loses is seen along one random direction; before, the sketch
    tells all. Parts of one form are looked at together, some at a time.
    """
    found: list[Any] = [None] * len(parts)
    alike: dict[Any, list[int]] = {}
    for i, part in enumerate(parts):
        alike.setdefault(part.form(), []).append(i)
    for (kind, width, *_), members in alike.items():
        own: Any = [parts[i] for i in members]
        if kind == "whole":
            total = torch.stack(norms_of_tensors([part.value for part in own])).square()
        elif kind == "sketch":
            total = torch.stack(norms_of_tensors([part.sketch for part in own])).square() / width
        else:
            size = max(1, TOGETHER // own[0].copied)
            total = torch.cat([_estimates(own[k : k + size]) for k in range(0, len(own), size)])
        for i, energy in zip(members, total.unbind(), strict=True):
            found[i] = energy
    return found


def norms_of_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Their Frobenius norms, scalars in ``compute_dtype``, from few operations."""
    found: list[Any] = [None] * len(tensors)
    for dtype in {compute_dtype(x.dtype) for x in tensors}:
        members = [i for i, x in enumerate(tensors) if compute_dtype(x.dtype) == dtype]
        norms = torch._foreach_norm([tensors[i] for i in members], 2, dtype)
        for i, norm in zip(members, norms, strict=True):
            found[i] = norm
    return found


def _estimates(parts: Sequence[Part]) -> Tensor:
    """Squared norms of the gradients of parts of one form, [count]."""
    P, d, R, along = (
        each[0] if len(each) == 1 else torch.cat(each) for each in zip(*(part.seen() for part in parts), strict=True)
    )
    left, other = (R, P.mT @ d) if parts[0].matrix.side == "right" else (d.mT @ P, R)  # lift(R) along d
    lost = torch.baddbmm(along, left, other, alpha=-1.0)
    squares = [torch.linalg.vector_norm(x, dim=(1, 2)).square() for x in (R, lost)]
    return (squares[0] + squares[1]).view(len(parts), -1).sum(dim=1)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
