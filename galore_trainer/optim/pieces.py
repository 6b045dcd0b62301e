"""What a process does of a logical matrix: the rows it holds, as matrices that the ordinary step takes.

Under FSDP2 and ZeRO a process holds some rows of a stored weight. Projection on the right needs whole rows and nothing
else, so its rows of one basis are a matrix of their own: a piece. A piece of several blocks has equally many rows of
each. State lies with the parameter: bases whole on every process, everything else row by row in the order of the
stored weight ([local rows, width], whatever the heads), so that it shards and gathers like the weight itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.core.matrix import LogicalMatrix

ROW_KEYS = (
    "exp_avg", "exp_avg_sq", "candidate_index", "candidate_mean", "residual_index", "residual_exp_avg",
    "residual_exp_avg_sq",
)  # fmt: skip
BASIS_KEYS = ("basis", "basis_scale")
AGE_KEYS = ("step", "residual_step")  # each piece counts its own: kernels do so where the number lies


@functools.lru_cache(maxsize=1 << 10)
def _bare(key: str) -> str:
    """A key of a state without what names its matrix."""
    return key.rsplit(".", 1)[-1]


def stored_rows(matrix: LogicalMatrix, total_rows: int) -> Tensor:
    """Row of the stored weight of every logical row, [blocks, block rows]."""
    outer = torch.arange(matrix.outer, dtype=torch.int64, device="cpu")[:, None] * (total_rows // matrix.outer)
    inner = matrix.start + torch.arange(matrix.length, dtype=torch.int64, device="cpu")
    return (outer + inner).reshape(matrix.blocks, matrix.block_rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece(LogicalMatrix):
    """Local rows of a logical matrix, [blocks, rows of each, n]; they are all of the tensor that it is taken from.

    Attributes:
        at: those rows among the local ones, block by block: a slice, or indices.
        bases: the blocks of the whole matrix that these are.
        name: unlike that of any other piece on any process.
    """

    at: Any
    bases: Any
    name: str

    @functools.cached_property
    def follows(self) -> bool:
        """Whether its rows follow one another among the local ones."""
        return isinstance(self.at, slice)

    def of(self, rows: Tensor) -> Tensor:
        """Its rows of the local ones, [local rows, ...]: a view where they follow one another, else a copy."""
        return rows if self.follows and len(rows) == self.length else rows[self.at]


def pieces_of(matrix: LogicalMatrix, name: str, total_rows: int, first: int, local_rows: int) -> list[Piece]:
    """The pieces of local rows ``first:first + local_rows`` that belong to a logical matrix.

    Args:
        matrix: the whole one; projected on the right, stored as it is.
        name: its logical name.
        total_rows: of the stored weight.
        first, local_rows: what this process has of it.
    """
    local = stored_rows(matrix, total_rows) - first
    here = (local >= 0) & (local < local_rows)  # [blocks, block rows]
    counts = here.sum(dim=1)
    found = []
    for count in sorted({int(c) for c in counts if c}):
        blocks = (counts == count).nonzero().flatten()
        at = torch.cat([local[b][here[b]] for b in blocks])
        found.append(
            Piece(
                label=matrix.label,
                length=len(at),
                columns=matrix.columns,
                rank=matrix.rank,
                blocks=len(blocks),
                at=_as_slice(at),
                bases=_as_slice(blocks),
                name=f"{name}@{first + int(at[0])}",
            )
        )
    return found


def _as_slice(index: Tensor) -> Any:
    """A slice where indices follow one another, since it makes views."""
    start, length = int(index[0]), len(index)
    follows = torch.equal(index, torch.arange(start, start + length, dtype=torch.int64, device="cpu"))
    return slice(start, start + length) if follows else index


class PieceState(MutableMapping[str, Any]):
    """A piece's view of its parameter's state: reads what was there when the step began, and what it wrote since.

    What it writes reaches the parameter's state in ``commit``.

    Args:
        base: the parameter's state.
        piece: a part of one of its matrices.
        shares: whether other pieces of this matrix are here, which read the same counters.
    """

    def __init__(self, base: MutableMapping[str, Any], piece: Piece, *, shares: bool) -> None:
        self.base, self.piece, self._shares = base, piece, shares
        self.own: dict[str, Any] = {}
        self.gone: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        if key in self.own:
            return self.own[key]
        if key in self.gone:
            raise KeyError(key)
        name, piece = _bare(key), self.piece
        if name in ROW_KEYS:
            value = piece.of(self.base[name])
            return value.view(piece.blocks, piece.block_rows, value.shape[-1])
        value = self.base[key]
        if self._shares and name in AGE_KEYS:
            self.own[key] = value = value.clone()
        return value[piece.bases] if name in BASIS_KEYS else value

    def __setitem__(self, key: str, value: Any) -> None:
        self.own[key] = value
        self.gone.discard(key)

    def __delitem__(self, key: str) -> None:
        self.own.pop(key, None)
        self.gone.add(key)

    def __iter__(self) -> Iterator[str]:
        raise TypeError("a piece's state is read by key")

    def __len__(self) -> int:
        return len(self.base)

    def __contains__(self, key: object) -> bool:
        name = _bare(str(key))
        return key in self.own or (key not in self.gone and (name if name in ROW_KEYS else key) in self.base)


def commit(base: MutableMapping[str, Any], states: Sequence[PieceState], local_rows: int) -> None:
    """Put what the pieces of one parameter wrote into its state."""
    new: dict[str, Tensor] = {}
    for state in states:
        for key, value in state.own.items():
            name = _bare(key)
            if name not in ROW_KEYS:
                base[key] = value
                continue
            rows = value.reshape(-1, value.shape[-1])
            if isinstance(state.piece.at, slice) and len(rows) == local_rows:
                new[name] = rows
                continue
            if name not in new:
                old = base.get(name)
                known = old is not None and old.shape[-1] == rows.shape[-1]
                new[name] = old.clone() if known else rows.new_zeros(local_rows, rows.shape[-1])  # type: ignore[union-attr]
            new[name][state.piece.at] = rows
    base.update(new)
    for name in {_bare(key) for state in states for key in state.gone}:
        base.pop(name, None)
