"""What layer-wise mode keeps of a gradient. All of it is linear in the gradient, so that micro-batches add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.basis import sketch_width
from galore_trainer.core.galore import compute_dtype, project, usable_parts, widen
from galore_trainer.core.matrix import LogicalMatrix, Side
from galore_trainer.core.precision import Stored, decode_basis
from galore_trainer.core.sparse import Support, read_at
from galore_trainer.core.streams import stream
from galore_trainer.optim.guards import usable_flags

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


class KeptGradient:
    """What is kept of the gradient of one logical matrix.

    Args:
        matrix: where it lies, and how it is projected.
        state: of its weight.
        sketches: makes the matrices of ``sketch``; called while there is no basis.
        direction: from ``Directions``; None while there is no basis.

    Attributes:
        sketch: before the first basis, see ``sketch``; else None.
        projected: R, in the shape of the moments; None before the first basis.
        sampled: G at the residual's candidates or support, None while there are none.
        factor: pending scale of all of these, for example from clipping; applied lazily; None is 1.
    """

    def __init__(
        self, matrix: LogicalMatrix, state: Mapping[str, Any], sketches: Callable[[], Tensor], direction: Tensor | None
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
        """Multiply the gradient by a number; the device does nothing before the product is needed."""
        self.factor = factor if self.factor is None else self.factor * factor

    def settle_factor(self) -> None:
        """Apply the pending scale."""
        if self.factor is not None:
            for tensor in self._by_kind().values():
                tensor.mul_(self.factor)
            self.factor = None

    def clear(self) -> None:
        """Set the gradient to zero."""
        self.factor = None
        for tensor in self._by_kind().values():
            tensor.zero_()

    def kept(self) -> list[tuple[str, Tensor]]:
        """Everything that is kept, by kind."""
        self.settle_factor()
        return list(self._by_kind().items())

    def _by_kind(self) -> dict[str, Tensor]:
        kinds = {"sketch": self.sketch, "projected": self.projected, "sampled": self.sampled, "along": self._along}
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

    def estimate_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Basis and direction in the dtype of R, [blocks, ...], R, and G along the direction."""
        assert self.projected is not None
        assert self._along is not None
        assert self._direction is not None
        P = decode_basis(self._basis).to(self.projected.dtype)
        return P, self._direction.to(P.dtype).expand(len(P), -1, -1), self.projected, self._along

    def usable(self) -> Tensor:
        """Whether moments can take the gradient in: a scalar tensor, boolean."""
        self.settle_factor()
        tensors = [x for x in (self.sketch, self.projected, self.sampled) if x is not None]
        return torch.stack([usable_parts(x, 1)[0] > 0.0 for x in tensors]).all()


class KeptWhole:
    """A whole gradient, for a step that needs it: takes the place of the ``KeptGradient`` of every matrix."""

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
        """As of a ``KeptGradient``."""
        return ("whole", self._value.dtype, self._value.device)

    def usable(self) -> Tensor:
        """Whether moments can take the gradient in: a scalar tensor, boolean."""
        return usable_flags([self._value])[0] > 0.0

    @property
    def _value(self) -> Tensor:
        assert self.value is not None
        return self.value


def energies(parts: Sequence[KeptGradient | KeptWhole]) -> list[Tensor]:
    """Unbiased estimates of the squared Frobenius norms of kept gradients, scalar tensors.

    With a basis the projected part is known, and the lost part is estimated along one random direction. Before the
    first basis the sketch gives the estimate. Gradients of one form are treated together, some at a time.
    """
    squares: list[Any] = [None] * len(parts)
    alike: dict[Any, list[int]] = {}
    for i, part in enumerate(parts):
        alike.setdefault(part.form(), []).append(i)
    for (kind, width, *_), positions in alike.items():
        members: Any = [parts[i] for i in positions]
        if kind == "whole":
            total = torch.stack(norms_of_tensors([part.value for part in members])).square()
        elif kind == "sketch":
            total = torch.stack(norms_of_tensors([part.sketch for part in members])).square() / width
        else:
            size = max(1, TOGETHER // members[0].copied)
            total = torch.cat([_estimates(members[k : k + size]) for k in range(0, len(members), size)])
        for i, energy in zip(positions, total.unbind(), strict=True):
            squares[i] = energy
    return squares


def norms_of_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Frobenius norms, scalar tensors in ``compute_dtype``, in few launches."""
    norms: list[Any] = [None] * len(tensors)
    for dtype in {compute_dtype(x.dtype) for x in tensors}:
        positions = [i for i, x in enumerate(tensors) if compute_dtype(x.dtype) == dtype]
        computed = torch._foreach_norm([tensors[i] for i in positions], 2, dtype)
        for i, norm in zip(positions, computed, strict=True):
            norms[i] = norm
    return norms


def _estimates(parts: Sequence[KeptGradient]) -> Tensor:
    """Squared norms of kept gradients of one form that have a basis, [count]."""
    P, d, R, along = (
        x[0] if len(x) == 1 else torch.cat(x) for x in zip(*(part.estimate_inputs() for part in parts), strict=True)
    )
    left, other = (R, P.mT @ d) if parts[0].matrix.side == "right" else (d.mT @ P, R)  # lift(R) along d
    lost = torch.baddbmm(along, left, other, alpha=-1.0)
    squares = [torch.linalg.vector_norm(x, dim=(1, 2)).square() for x in (R, lost)]
    return (squares[0] + squares[1]).view(len(parts), -1).sum(dim=1)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
