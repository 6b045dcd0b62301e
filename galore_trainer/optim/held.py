"""A weight of which this process holds a part, in one step."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.galore import compute_dtype
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.layouts.shard import Shard
from galore_trainer.optim.pieces import Piece, PieceState, commit
from galore_trainer.optim.residual_state import AGE as RESIDUAL_AGE
from galore_trainer.optim.skips import no_skips
from galore_trainer.optim.stack import AGE, Job, Stack
from galore_trainer.targets.matrices import has_residual


class Held:
    """A weight of which this process holds a part, in one step.

    Args:
        name: logical name.
        group: the optimizer's group.
        state: of this weight.
        shard: where the part lies.
        weight, grad: its entries, [stop - start]; the weight's is changed in place.
        matrices: its logical matrices; none where it is plain.
        pieces: of each matrix, the local part.
        factors: see ``Job``.
    """

    def __init__(
        self, name: str, group: dict[str, Any], state: MutableMapping[str, Any], shard: Shard, weight: Tensor,
        grad: Tensor, matrices: Sequence[LogicalMatrix] = (), pieces: Sequence[Sequence[Piece]] = (),
        factors: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.name, self.group, self.state, self.shard = name, group, state, shard
        self.weight, self.grad, self.matrices, self.pieces = weight, grad, matrices, pieces
        self.factors = factors
        self.cut_rows: dict[int, Tensor] = {}
        self.ok = self.energy = torch.zeros((), dtype=torch.float32, device=weight.device)

    @property
    def fresh(self) -> bool:
        """Whether no gradient has been taken in yet."""
        return not self.state or self.state["calls"] == self.state.get("refreshes", 0) == 0

    @property
    def due(self) -> bool:
        """Whether new bases are due."""
        return bool(self.matrices) and self.state["calls"] >= self.state["due"]

    @property
    def is_copied(self) -> bool:
        """Whether a step takes copies of its rows: some are cut, or a piece's do not follow one another."""
        return self.shard.is_ragged or not all(piece.follows for own in self.pieces for piece in own)

    @property
    def made_in(self) -> torch.dtype:
        """The dtype in which the model makes this gradient, whatever adds it up."""
        return self.factors or self.grad.dtype

    def make_state(self, config: GaLoreConfig, phase: int) -> None:
        """The state of a projected weight that has seen nothing."""
        state, rows, device = self.state, self.shard.local_rows, self.weight.device
        state.update(calls=0, refreshes=0, due=0, born=0, phase=phase, skipped=no_skips(device))
        for matrix in self.matrices:
            whole = self.stack(matrix, state)
            whole.put_basis(torch.zeros(matrix.basis_shape, dtype=whole.dtype, device=device))
            whole.put_count(AGE, whole.ages(1))
        wide = compute_dtype(self.weight.dtype)
        shape, dtype = (rows, self.matrices[0].rank), {32: wide, 16: torch.bfloat16}[config.state_bits]
        state.update({key: torch.zeros(shape, dtype=dtype, device=device) for key in ("exp_avg", "exp_avg_sq")})

    def gradient(self) -> Tensor:
        """Local rows, complete: [local rows, N]."""
        rows = self.shard.rows_of(self.grad)
        for row, entries in self.cut_rows.items():
            rows[row] = entries
        return rows

    def job(self, matrix: LogicalMatrix, state: Any, W: Tensor | None = None, G: Tensor | None = None) -> Job:
        """What a step does to one of its matrices, or to a piece of one; without ``W`` only to the state."""
        W = self.weight if W is None else W
        name = matrix.name if isinstance(matrix, Piece) else matrix.logical(self.name)
        return Job(W, W if G is None else G, name, matrix, state, self.group, None, False, self.ok, self.factors)

    def stack(self, matrix: LogicalMatrix, state: Any) -> Stack:
        """A stack of one job."""
        return Stack([self.job(matrix, state)])


class Opened:
    """A weight in the midst of its step: its rows, its gradient's, and the states of its pieces.

    Args:
        w: where ``rows_of`` copies, what is written reaches it in ``close``.
    """

    def __init__(self, w: Held) -> None:
        self.w, self.W, self.G = w, w.shard.rows_of(w.weight), w.gradient()
        self.states = piece_states(w.state, w.pieces)
        self._copies: list[tuple[Piece, Tensor]] = []

    def job(self, i: int) -> Job:
        """What the step does to one of its pieces."""
        state = self.states[i]
        piece, W = state.piece, state.piece.of(self.W)
        if not piece.follows:
            self._copies.append((piece, W))
        return self.w.job(piece, state, W, piece.of(self.G))

    def close(self, config: GaLoreConfig) -> None:
        """Every piece has moved."""
        w = self.w
        for piece, W in self._copies:
            self.W[piece.at] = W
        commit(w.state, self.states, w.shard.local_rows)
        for matrix, pieces in zip(w.matrices, w.pieces, strict=True):
            if not pieces:
                _count_along(w, matrix, config)
        w.shard.write(w.weight, self.W)
        w.state["calls"] += 1


def piece_states(state: MutableMapping[str, Any], pieces: Sequence[Sequence[Piece]]) -> list[PieceState]:
    """How the pieces of one weight read and write its state."""
    return [PieceState(state, piece, shares=len(own) > 1) for own in pieces for piece in own]


def _count_along(w: Held, matrix: LogicalMatrix, config: GaLoreConfig) -> None:
    """Without a row of a matrix its counters go on, so that they are the same on every process."""
    state, prefix = w.state, matrix.prefix
    state[prefix + AGE] = state[prefix + AGE] + w.ok
    if not has_residual(matrix, config) or state["refreshes"] == 0:
        return
    key, chosen = prefix + RESIDUAL_AGE, state["calls"] - state["born"] + 1 >= config.residual_warmup_steps
    if key in state:
        state[key] = state[key] + w.ok
    elif chosen:
        state[key] = w.ok if config.residual_warmup_steps == 0 else torch.zeros_like(w.ok)
