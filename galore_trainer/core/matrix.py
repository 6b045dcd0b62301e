"""What the optimizer projects: a logical matrix inside a stored parameter, its heads, and who lends a basis.

A stored parameter holds one or several logical matrices: a fused QKV weight holds three. A logical matrix of m rows and
n columns is cut into ``blocks`` of equal height, each with a basis of its own:

===========  ==========================  ===================================
head_sharing  blocks                      rows that give a block its basis
===========  ==========================  ===================================
joint         1                           all
shared        1                           one head (or the fewest that span the rank)
grouped       heads / group size          the same, inside each group
per_head      heads                       the block itself
===========  ==========================  ===================================

A stack of experts has one block for each expert. Everything downstream sees tensors [blocks, rows, n] only.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from galore_trainer.core.galore import widen

Side = Literal["right", "left"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogicalMatrix:
    """Where a logical matrix lies in its parameter, and how it is projected.

    The stored tensor (after ``transposed``) is read as [outer, total, n] and rows ``start:start + length`` of the
    middle dimension belong to this matrix, so m = outer * length. Plain weights have outer = 1; GPT-NeoX, whose rows
    are interleaved per head, has outer = heads. A stack of experts [experts, rows, n] has outer = experts.

    Attributes:
        label: ``""`` where the parameter is one matrix, else ``q``, ``k`` or ``v``.
        outer, start, length: the rows, as above.
        columns: n.
        transposed: stored as [n, m] (GPT-2's ``Conv1D``).
        side: ``right`` projects columns (P is n x r), ``left`` rows (P is rows x r).
        rank: r.
        blocks: number of bases.
        head_dim: rows of a head, 0 where heads play no part.
        lenders: heads stacked to give a block its basis, 0 for the whole block.
    """

    label: str = ""
    outer: int = 1
    start: int = 0
    length: int
    columns: int
    transposed: bool = False
    side: Side = "right"
    rank: int
    blocks: int = 1
    head_dim: int = 0
    lenders: int = 0

    @property
    def rows(self) -> int:
        """Rows m of the whole logical matrix."""
        return self.outer * self.length

    @functools.cached_property
    def prefix(self) -> str:
        """What this matrix's keys in its parameter's state begin with."""
        return f"{self.label}." if self.label else ""

    @functools.cached_property
    def form(self) -> tuple[object, ...]:
        """Equal for matrices whose arrays have equal shapes and lie equally in theirs."""
        return (self.outer, self.length, self.columns, self.transposed, self.side, self.rank, self.blocks)

    def logical(self, name: str) -> str:
        """Its own name, from that of its parameter."""
        return f"{name}.{self.label}" if self.label else name

    @property
    def lends_heads(self) -> bool:
        """Whether some heads of a block give it its basis, and not all of its rows."""
        return self.lenders not in (0, self.heads_per_block)

    @property
    def block_rows(self) -> int:
        """Rows of one block."""
        return self.rows // self.blocks

    @property
    def loses(self) -> bool:
        """Whether the projection loses anything; at full rank what is left is rounding, no residual to train on."""
        return self.rank < (self.columns if self.side == "right" else self.block_rows)

    @property
    def heads_per_block(self) -> int:
        """Heads in a block, 1 where heads play no part."""
        return self.block_rows // self.head_dim if self.head_dim else 1

    @property
    def lending_shape(self) -> tuple[int, int, int]:
        """Shape of what ``lend`` returns: [blocks, lending rows, n]."""
        return self.blocks, self.lenders * self.head_dim or self.block_rows, self.columns

    @property
    def basis_shape(self) -> tuple[int, int, int]:
        """Shape of P: [blocks, n, r] or [blocks, rows, r]."""
        return self.blocks, self.columns if self.side == "right" else self.block_rows, self.rank

    @functools.cached_property
    def moment_shape(self) -> tuple[int, int, int]:
        """Shape of R, M and V: [blocks, rows, r] or [blocks, r, n]."""
        if self.side == "right":
            return self.blocks, self.block_rows, self.rank
        return self.blocks, self.rank, self.columns

    def rows_of(self, stored: Tensor) -> Tensor:
        """The matrix as [outer, length, n]: always a view."""
        by_rows = stored.mT if self.transposed else stored
        if by_rows.dim() == 2:
            by_rows = by_rows.unflatten(0, (self.outer, -1))
        return by_rows.narrow(1, self.start, self.length)

    def take(self, stored: Tensor) -> Tensor:
        """The matrix as [blocks, rows, n]: a view where strides allow, else a copy."""
        if stored.shape == (self.length, self.columns) and not self.transposed:  # one whole weight, as most are
            return stored.reshape(self.blocks, self.block_rows, self.columns)
        return self.rows_of(stored).reshape(self.blocks, self.block_rows, self.columns)

    def put(self, stored: Tensor, blocks: Tensor) -> None:
        """Write [blocks, rows, n] back; nothing is copied where ``take`` gave a view that was changed in place."""
        if blocks.untyped_storage()._cdata != stored.untyped_storage()._cdata:
            target = self.rows_of(stored)
            target.copy_(blocks.reshape(target.shape))

    def lend(self, blocks: Tensor, heads: Tensor | None) -> Tensor:
        """The rows that give each block its basis.

        Args:
            blocks: [blocks, rows, n].
            heads: indices [blocks, lenders] of the lending heads within their block; None lends the whole block.

        Returns:
            [blocks, lenders * head_dim, n], or ``blocks`` itself.
        """
        if heads is None:
            return blocks
        by_head = blocks.unflatten(1, (self.heads_per_block, self.head_dim))  # [blocks, heads, d, n]
        block = torch.arange(len(heads), dtype=torch.int64, device=heads.device)[:, None]
        return by_head[block, heads].flatten(1, 2)

    def energy(self, blocks: Tensor) -> Tensor:
        """Squared norm of each head's gradient, [blocks, heads]."""
        by_head = blocks.unflatten(1, (self.heads_per_block, self.head_dim))
        return widen(by_head).square().sum(dim=(-2, -1))


# ---------------------------------------------------------------------- rows that one process holds


class Rows(NamedTuple):
    """The local rows of some blocks of a logical matrix, equally many of each block.

    Attributes:
        matrix: these rows as a logical matrix, [blocks, rows of each, n].
        at: where they are among the local rows of the weight, block by block: a slice, or indices.
        bases: which bases of the logical matrix are theirs: a slice, or indices.
        name: seeds random streams; no two pieces of any process have equal names.
        prefix: of their keys in the weight's state.
    """

    matrix: LogicalMatrix
    at: Any
    bases: Any
    name: str
    prefix: str

    def of(self, rows: Tensor) -> Tensor:
        """These rows of [local rows, ...]: a view where they follow one another, else a copy."""
        if isinstance(self.at, slice) and len(rows) == self.matrix.length:
            return rows
        return rows[self.at]


def stored_rows(matrix: LogicalMatrix, total_rows: int) -> Tensor:
    """Row of the stored weight of every logical row, [blocks, block rows]."""
    outer = torch.arange(matrix.outer, dtype=torch.int64, device="cpu")[:, None] * (total_rows // matrix.outer)
    inner = matrix.start + torch.arange(matrix.length, dtype=torch.int64, device="cpu")
    return (outer + inner).reshape(matrix.blocks, matrix.block_rows)


@functools.lru_cache(maxsize=1 << 14)
def local_rows(matrix: LogicalMatrix, name: str, total_rows: int, first: int, count: int) -> list[Rows]:
    """The local rows of a logical matrix, by how many of each block are here.

    Args:
        matrix: projected on the right, stored as it is.
        name: of its weight.
        total_rows: of the stored weight.
        first, count: the rows of the stored weight that this process holds.
    """
    local = stored_rows(matrix, total_rows) - first
    here = (local >= 0) & (local < count)  # [blocks, block rows]
    counts = here.sum(dim=1)
    parts: list[Rows] = []
    for rows_of_each in sorted({int(c) for c in counts if c}):
        blocks = (counts == rows_of_each).nonzero().flatten()
        at = torch.cat([local[b][here[b]] for b in blocks])
        piece = LogicalMatrix(
            label=matrix.label, length=len(at), columns=matrix.columns, rank=matrix.rank, blocks=len(blocks)
        )
        logical = f"{matrix.logical(name)}@{first + int(at[0])}"
        prefix = f"{matrix.prefix}@{len(parts)}."
        parts.append(Rows(piece, _as_slice(at), _as_slice(blocks), logical, prefix))
    return parts


def _as_slice(index: Tensor) -> Any:
    """A slice where indices follow one another, since it makes views."""
    start, length = int(index[0]), len(index)
    follows = torch.equal(index, torch.arange(start, start + length, dtype=torch.int64, device="cpu"))
    return slice(start, start + length) if follows else index
