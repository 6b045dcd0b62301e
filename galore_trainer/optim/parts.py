"""What layer-wise mode keeps of a gradient: all of it linear, so that micro-batches add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.basis import sketch_width
from galore_trainer.core.galore import project
from galore_trainer.core.heads import LogicalMatrix, Side
from galore_trainer.core.precision import Stored, decode_basis
from galore_trainer.core.sparse import Support, read_at
from galore_trainer.optim.streams import stream

SUPPORTS = ("residual_index", "candidate_index")
"""Keys of the positions at which the residual wants the gradient, the newer first."""
ACROSS: dict[str, Side] = {"right": "left", "left": "right"}


def width_of_sketch(matrix: LogicalMatrix, config: GaLoreConfig, m: int, n: int) -> int:
    """Columns of the test matrix for m x n rows that give a basis of this matrix."""
    return sketch_width(matrix.rank, config.resolved_oversampling(matrix.rank), m, n)


def sketch_matrices(matrix: LogicalMatrix, config: GaLoreConfig, seed: int, name: str, device: torch.device) -> Tensor:
    """Gaussian matrices for ``sketch``: [blocks, rows, k] (right) or [blocks, n, k] (left)."""
    k = width_of_sketch(matrix, config, matrix.block_rows, matrix.columns)
    length = matrix.block_rows if matrix.side == "right" else matrix.columns
    draws = (stream(device, seed, name, "sketch", b) for b in range(matrix.blocks))
    return torch.stack([torch.randn(length, k, generator=g, device=device) for g in draws])


def sketch(G: Tensor, T: Tensor, side: str) -> Tensor:
    """T^T G [blocks, k, n] (right) or G T [blocks, rows, k] (left), float32: linear in G, and enough for a basis."""
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
            numbers = torch.randn(rows, length, 1, generator=generator, device=like.device)
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
            self.sampled = _plus(self.sampled, read_at(G, self._support).float())

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

    def pieces_of_norm(self) -> tuple[list[Tensor], float]:
        """Tensors whose squares add up to an unbiased estimate of the gradient's squared norm, and a divisor of it.

        With a basis the projected part is known, and what it loses is seen along one random direction; before, the
        sketch tells all.
        """
        self.settle_factor()
        right = self.matrix.side == "right"
        if self.sketch is not None:
            return [self.sketch], float(self.sketch.shape[-2 if right else -1])
        R, along, d, P = self.projected, self._along, self._direction, decode_basis(self._basis)
        assert R is not None
        assert along is not None
        assert d is not None
        d = d.float().expand(len(P), -1, -1)
        left, other = (R, P.mT @ d) if right else (d.mT @ P, R)  # their product is lift(R) along d
        return [R, torch.baddbmm(along, left, other, alpha=-1.0)], 1.0

    def finite(self) -> Tensor:
        """Whether every number of the gradient was finite: a scalar tensor, boolean."""
        self.settle_factor()
        kept = self.sketch if self.sketch is not None else self.projected
        assert kept is not None
        return torch.isfinite(kept).all()


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

    def pieces_of_norm(self) -> tuple[list[Tensor], float]:
        """As of a ``Part``."""
        return [self._value], 1.0

    def finite(self) -> Tensor:
        """Whether every number is finite: a scalar tensor, boolean."""
        return torch.isfinite(self._value).all()

    @property
    def _value(self) -> Tensor:
        assert self.value is not None
        return self.value


def energies(parts: Sequence[Part | Whole]) -> list[Tensor]:
    """Squared Frobenius norms of gradients of which parts were kept: estimates, see ``Part.pieces_of_norm``."""
    each = [part.pieces_of_norm() for part in parts]
    found: list[Any] = [None] * len(parts)
    alike = [(len(tensors), tensors[0].device) for tensors, _ in each]
    for count, device in dict.fromkeys(alike):
        here = [i for i, key in enumerate(alike) if key == (count, device)]
        tensors = [x for i in here for x in each[i][0]]
        wide = any(x.dtype == torch.float64 for x in tensors)
        norms = torch.stack(torch._foreach_norm(tensors, 2, None if wide else torch.float32)).float()
        for i, total in zip(here, norms.view(-1, count).square().sum(dim=1).unbind(), strict=True):
            found[i] = total if each[i][1] == 1.0 else total / each[i][1]
    return found


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
