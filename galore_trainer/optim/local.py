"""The weights that a step moves, and the local rows of their logical matrices.

A whole weight is the shard that holds every row, so one path serves every backend. Under FSDP2 and ZeRO a process holds
some rows of a stored weight. Projection on the right needs whole rows and nothing else, so the local rows of one basis
are a matrix of their own. Their state lies with the weight under keys of their own: rows, DTensors and flat slices
exist only where state is saved or loaded (``state_forms.py``, ``reshard.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_trainer.core.matrix import LogicalMatrix, Rows, local_rows
from galore_trainer.layouts.shard import Ranks, Shard, completed_cut_rows
from galore_trainer.optim.guards import usable_flags, usable_norms
from galore_trainer.optim.kept import KeptGradient, norms_of_tensors

AGE, RESIDUAL_AGE = "step", "residual_step"
"""Keys of the steps that a weight's moments, and those of its residual, have taken in: one number a weight."""


class Piece(NamedTuple):
    """The local rows of one logical matrix in one step.

    Attributes:
        weight, grad: tensors in which ``matrix`` lies; ``grad`` is not read where ``kept`` is given.
        name: logical name, with ``.q`` and the like for a part of a fused weight.
        matrix: where the rows lie in ``weight``, and how they are projected.
        prefix: of the keys of its moments and residual in ``owner.state``; its bases lie under ``matrix.prefix``.
        owner: the weight.
        kept: what layer-wise mode kept of the gradient; None where ``grad`` is whole.
        block_index: which blocks of the logical matrix, and so which bases, are here; None for all of them.
        foreign: which rows, of all blocks one after the other, another process owns; None where there are none.
    """

    weight: Tensor
    grad: Tensor
    name: str
    matrix: LogicalMatrix
    prefix: str
    owner: LocalWeight
    kept: KeptGradient | None = None
    block_index: Any = None
    foreign: Any = None

    @property
    def state(self) -> MutableMapping[str, Any]:
        """The state of the weight."""
        return self.owner.state

    def basis(self, key: str) -> Tensor | None:
        """A stored basis, or its scale, of these rows."""
        stored: Tensor | None = self.owner.state.get(self.matrix.prefix + key)
        return stored if stored is None or self.block_index is None else stored[self.block_index]

    def key(self) -> tuple[Any, ...]:
        """Equal for pieces that one bucket may hold."""
        m, s, owner = self.matrix, self.owner.state, self.owner
        shape = (m.blocks, m.block_rows, m.columns, m.side, m.rank, m.head_dim, m.lenders)
        phase = (self.kept is None, owner.ok is None, s["refreshes"] > 0, s["calls"] - s["born"], s["refreshes"])
        lies = (owner.shard.ranks, self.weight.device)
        return (id(owner.group), *shape, *phase, *lies, self.weight.dtype, self.grad.dtype, owner.compute_in)


class LocalWeight:
    """A weight that has a gradient in this step.

    Args:
        name: logical name.
        group: the optimizer's group.
        state: of this weight; empty before its first step.
        shard: the entries that this process holds.
        weight, grad: the parameter and its gradient; of a cut weight this process's entries, [stop - start].
        matrices: its logical matrices; none for plain AdamW.
        kept: of each matrix, what layer-wise mode kept of its gradient; None where ``grad`` is whole.
        compute_in: the dtype that factors of products are rounded to, where weight and gradient have another one:
            bfloat16 where a model computes in it and its optimizer adds up in float32 (ZeRO).

    Attributes:
        ok: 1.0 where every gradient of the weight on every process is usable, else 0.0; None until that is known.
        energy: squared norm of the whole gradient, over all processes, float64; None until it was asked for.
        clip: scalar that multiplies the gradient where it enters the step, in ``compute_dtype``; None is 1.
        complete_rows: rows of the gradient that several processes share, complete, by local row.
        age_keys: of the ages that grow in this step.
    """

    def __init__(
        self,
        name: str,
        group: dict[str, Any],
        state: MutableMapping[str, Any],
        shard: Shard,
        weight: Tensor,
        grad: Tensor,
        matrices: Sequence[LogicalMatrix] = (),
        kept: Sequence[KeptGradient] | None = None,
        compute_in: torch.dtype | None = None,
    ) -> None:
        self.name, self.group, self.state, self.shard = name, group, state, shard
        self.weight, self.grad, self.matrices, self.kept, self.compute_in = weight, grad, matrices, kept, compute_in
        self.ok: Tensor | None = None
        self.energy: Tensor | None = None
        self.clip: Tensor | None = None
        self.complete_rows: dict[int, Tensor] = {}
        self.age_keys: tuple[str, ...] = (AGE,)
        self._rows: Tensor | None = None
        self._copies: list[tuple[Any, Tensor]] = []

    @property
    def is_fresh(self) -> bool:
        """Whether no gradient has been taken in yet."""
        return not self.state or self.state["calls"] == self.state.get("refreshes", 0) == 0

    @property
    def is_due(self) -> bool:
        """Whether new bases are due."""
        return bool(self.matrices) and self.state["calls"] >= self.state["due"]

    @property
    def has_basis(self) -> bool:
        """Whether there was a refresh."""
        return bool(self.state["refreshes"])

    @property
    def ranks(self) -> Ranks:
        """The processes among which the weight is cut."""
        assert self.shard.ranks is not None
        return self.shard.ranks

    @property
    def made_in(self) -> torch.dtype:
        """The dtype in which the model makes the gradient, whatever adds it up."""
        return self.compute_in or self.grad.dtype

    @property
    def copied(self) -> int:
        """Entries of weight and gradient that ``open`` copies: where rows are cut, or do not follow one another."""
        if self.shard.is_whole:
            return 0
        follow = all(isinstance(rows.at, slice) for rows in self.rows())
        return 0 if follow and not self.shard.is_ragged else self.weight.numel()

    def rows(self, matrix: LogicalMatrix | None = None) -> list[Rows]:
        """Of a cut weight the local rows of one logical matrix, or of all of them."""
        return rows_of_shard(self.matrices if matrix is None else [matrix], self.name, self.shard, self.weight.device)

    def gradient(self) -> Tensor:
        """Local rows of a cut weight's gradient, complete: [local rows, N]."""
        grads = self.shard.rows_of(self.grad)
        for row, entries in self.complete_rows.items():
            grads[row] = entries
        return grads

    def matrix_pieces(self) -> list[Piece]:
        """One piece a logical matrix, for its bases. Of a cut weight neither ``weight`` nor ``grad`` may be read."""
        if len(self.matrices) == 1:  # as most weights have: a step of a small model costs the host more than the device
            m, part = self.matrices[0], self.kept[0] if self.kept else None
            return [Piece(self.weight, self.grad, self.name, m, m.prefix, self, part)]
        kept: Sequence[KeptGradient | None] = self.kept or [None] * len(self.matrices)
        return [
            Piece(self.weight, self.grad, m.logical(self.name), m, m.prefix, self, part)
            for m, part in zip(self.matrices, kept, strict=True)
        ]

    def named_bases(self, ranks: Ranks | None) -> list[tuple[Ranks | None, str, Tensor, int]]:
        """Of each matrix what ``guards.compare_bases`` takes; ``ranks`` hold the weight too where it is whole."""
        refreshes, state = self.state["refreshes"], self.state
        return [
            (self.shard.ranks or ranks, m.logical(self.name), state[f"{m.prefix}basis"], refreshes)
            for m in self.matrices
        ]

    def pieces_of_state(self, matrix: LogicalMatrix | None = None) -> list[Piece]:
        """The pieces with their state alone. Of a cut weight neither ``weight`` nor ``grad`` may be read."""
        if self.shard.is_whole:
            return [piece for piece in self.matrix_pieces() if matrix is None or piece.matrix is matrix]
        return [self._piece(rows, self.weight, self.grad) for rows in self.rows(matrix)]

    def open(self) -> list[Piece]:
        """The pieces that this step moves. ``close`` writes back what had to be copied."""
        if self.shard.is_whole:
            return self.matrix_pieces()
        self._rows, grads = self.shard.rows_of(self.weight), self.gradient()
        pieces = []
        for rows in self.rows():
            weight = rows.of(self._rows)
            if not isinstance(rows.at, slice):
                self._copies.append((rows.at, weight))
            pieces.append(self._piece(rows, weight, rows.of(grads)))
        return pieces

    def close(self) -> None:
        """Write back the rows that ``open`` copied.

        Each process moves the whole of a row that is cut, of which it holds some entries, and keeps those entries.
        """
        if self._rows is not None:
            for at, weight in self._copies:
                self._rows[at] = weight
            self.shard.write(self.weight, self._rows)
            self._rows, self._copies = None, []

    def _piece(self, rows: Rows, weight: Tensor, grad: Tensor) -> Piece:
        return Piece(
            weight, grad, rows.name, rows.matrix, rows.prefix, self, None, rows.block_index, self._foreign(rows.at)
        )

    def _foreign(self, at: Any) -> Any:
        """Which of the local rows at these positions another process owns: the first one, or none."""
        if not self.shard.owned.start:
            return None
        if isinstance(at, slice):
            return slice(0, 1) if at.start == 0 else None
        return at == 0


class Moved(NamedTuple):
    """Weights that have taken in a gradient, or skipped it, in this step.

    Attributes:
        weights: of one device.
        ok: [weights], 1.0 where the gradient was usable, else 0.0.
        age_keys: of the ages that still have to grow by ``ok``.
    """

    weights: Sequence[LocalWeight]
    ok: Tensor
    age_keys: Sequence[str]


def moved_together(weights: Iterable[LocalWeight]) -> list[Moved]:
    """Weights whose flags are known, by device and ages."""
    alike: dict[Any, list[LocalWeight]] = {}
    for w in weights:
        alike.setdefault((w.weight.device, w.age_keys), []).append(w)
    return [
        Moved(members, torch.stack([w.ok for w in members if w.ok is not None]), ages)
        for (_, ages), members in alike.items()
    ]


# ---------------------------------------------------------------------- what crosses processes in every step


def exchange(weights: Iterable[LocalWeight], clips: bool = False) -> None:
    """Learn what a step must know of its weights before it moves the first: flags, norms and cut rows.

    A weight of one matrix that is whole learns its flag from its projection. The parts of a fused weight move together
    or not at all, on every process, so their flag comes from the gradient: where its norm is below the limit, every
    projection and every lost entry is, too.

    Args:
        weights: of this step.
        clips: the norm of every gradient is wanted; ``clipping`` asks whole weights for it, and so for their flags.
    """
    by_ranks: dict[Ranks | None, list[LocalWeight]] = {}
    for w in weights:
        if not w.shard.is_whole or (len(w.matrices) > 1 and not clips):
            by_ranks.setdefault(w.shard.ranks, []).append(w)
    for ranks, members in by_ranks.items():
        if ranks is None:
            for w, ok in zip(members, _flags(members), strict=True):
                w.ok = ok
        else:
            _sum_over(ranks, members, clips)


def _flags(weights: Sequence[LocalWeight]) -> list[Tensor]:
    """Scalar tensors: whether this process's entries are usable."""
    flags: list[Any] = [None] * len(weights)
    for projected in (False, True):
        asked = [i for i, w in enumerate(weights) if bool(w.matrices) == projected and w.kept is None]
        grads = [weights[i].grad for i in asked]
        for i, ok in zip(asked, usable_flags(grads, order=2.0 if projected else float("inf")), strict=True):
            flags[i] = ok
    for i, w in enumerate(weights):
        if w.kept is not None:
            flags[i] = torch.stack([part.usable() for part in w.kept]).all().float()
    return flags


def _sum_over(ranks: Ranks, weights: Sequence[LocalWeight], clips: bool) -> None:
    flags: Sequence[Tensor] = () if clips else _flags(weights)
    numbers = []
    if clips or any(w.is_fresh or w.is_due for w in weights):  # the same on every process
        filled = [w.grad if w.grad.numel() else w.grad.new_zeros(1) for w in weights]
        norms = norms_of_tensors(filled)
        flags = flags or usable_norms(norms)
        numbers.append(torch.stack([norm.double() for norm in norms]).square())
    numbers.insert(0, 1.0 - torch.stack(list(flags)).double())
    bad, *energies = ranks.sum(torch.stack(numbers)).unbind()
    for w, ok in zip(weights, (bad == 0.0).float().unbind(), strict=True):
        w.ok = ok
    if energies:
        for w, energy in zip(weights, energies[0].unbind(), strict=True):
            w.energy = energy
    projected = [w for w in weights if w.matrices]  # plain AdamW works entry by entry and needs no complete rows
    if projected:
        completed = completed_cut_rows([w.shard for w in projected], [w.grad for w in projected])
        for w, complete_rows in zip(projected, completed, strict=True):
            w.complete_rows = complete_rows


def rows_of_shard(matrices: Iterable[LogicalMatrix], name: str, shard: Shard, device: torch.device) -> list[Rows]:
    """The rows of a weight's logical matrices that a shard on this device holds."""
    here = (shard.rows, shard.first, shard.local_rows)
    return [rows for matrix in matrices for rows in local_rows(matrix, name, *here, device)]
