"""What the optimizer projects: a logical matrix inside a stored parameter, its heads, and the heads that lend a basis.

A stored parameter holds one or more logical matrices: a fused QKV weight holds three. A logical matrix of m rows and n
columns is cut into ``blocks`` of equal height. Every block has its own basis, which is computed from its lending rows:

============  ===================  ===================================================
head_sharing  blocks               lending rows of a block
============  ===================  ===================================================
joint         1                    all
shared        1                    one head, or the fewest heads that can span the rank
grouped       heads / group size   as for shared, among the heads of the group
per_head      heads                all
============  ===================  ===================================================

A stack of experts has one block for each expert. All later code works on tensors [blocks, rows, n].
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from galore_trainer.core.galore import widen

Side = Literal["right", "left"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogicalMatrix:
    """Where a logical matrix lies in its parameter, and how it is projected.

    The stored tensor, transposed if ``transposed`` is set, is read as [outer, total, n]. This matrix is its entries
    [:, start:start + length], so that m = outer * length. Ordinary weights have outer = 1. GPT-NeoX interleaves the
    rows of q, k and v per head and has outer = heads. A stack of experts [experts, rows, n] has outer = experts.

    Attributes:
        label: ``""`` where the parameter is one matrix, else ``q``, ``k`` or ``v``.
        outer, start, length: the rows, as above.
        columns: n.
        transposed: whether the parameter is stored as [n, m] (GPT-2's ``Conv1D``).
        side: ``right`` projects rows of length n (P is n x r), ``left`` columns (P is block rows x r).
        rank: r.
        blocks: number of bases.
        head_dim: rows of a head; 0 where heads do not matter.
        lenders: number of lending heads of a block; 0 where the whole block gives its basis.
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
        """Prefix of this matrix's keys in the state of its parameter."""
        return f"{self.label}." if self.label else ""

    @functools.cached_property
    def form(self) -> tuple[object, ...]:
        """Equal for matrices of equal shapes and strides, so that one bucket may hold them."""
        return (self.outer, self.length, self.columns, self.transposed, self.side, self.rank, self.blocks)

    def logical(self, name: str) -> str:
        """The logical name, from the name of the parameter."""
        return f"{name}.{self.label}" if self.label else name

    @property
    def lends_heads(self) -> bool:
        """Whether the basis of a block comes from some of its heads instead of all its rows."""
        return self.lenders not in (0, self.heads_per_block)

    @property
    def block_rows(self) -> int:
        """Rows of one block."""
        return self.rows // self.blocks

    @property
    def loses(self) -> bool:
        """Whether the projection loses anything. At full rank a residual would be rounding errors only."""
        return self.rank < (self.columns if self.side == "right" else self.block_rows)

    @property
    def auto_scale(self) -> float:
        """sqrt(length of what is projected / rank): with it the RMS of lift(N) is near that of AdamW's update."""
        return math.sqrt(self.basis_shape[1] / self.rank)

    @property
    def heads_per_block(self) -> int:
        """Heads in a block; 1 where heads do not matter."""
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
        """This matrix inside its stored parameter, a view [outer, length, n]."""
        by_rows = stored.mT if self.transposed else stored
        if by_rows.dim() == 2:
            by_rows = by_rows.unflatten(0, (self.outer, -1))
        return by_rows.narrow(1, self.start, self.length)

    def take(self, stored: Tensor) -> Tensor:
        """This matrix as [blocks, rows, n]: a view where strides allow, else a copy."""
        if stored.shape == (self.length, self.columns) and not self.transposed:  # fast path: one matrix a parameter
            return stored.reshape(self.blocks, self.block_rows, self.columns)
        return self.rows_of(stored).reshape(self.blocks, self.block_rows, self.columns)

    def put(self, stored: Tensor, blocks: Tensor) -> None:
        """Write back what ``take`` returned; nothing is copied where it was a view."""
        if blocks.untyped_storage()._cdata != stored.untyped_storage()._cdata:
            target = self.rows_of(stored)
            target.copy_(blocks.reshape(target.shape))

    def lend(self, blocks: Tensor, heads: Tensor | None) -> Tensor:
        """The lending rows of every block.

        Args:
            blocks: [blocks, rows, n].
            heads: indices [blocks, lenders] of the lending heads within their block; None for whole blocks.

        Returns:
            [blocks, lenders * head_dim, n], or ``blocks`` itself.
        """
        if heads is None:
            return blocks
        by_head = blocks.unflatten(1, (self.heads_per_block, self.head_dim))  # [blocks, heads, d, n]
        block = torch.arange(len(heads), dtype=torch.int64, device=heads.device)[:, None]
        return by_head[block, heads].flatten(1, 2)

    def energy(self, blocks: Tensor) -> Tensor:
        """Squared Frobenius norm of every head's rows, [blocks, heads], in ``compute_dtype``."""
        by_head = blocks.unflatten(1, (self.heads_per_block, self.head_dim))
        return widen(by_head).square().sum(dim=(-2, -1))


# ---------------------------------------------------------------------- rows that one process holds


class Rows(NamedTuple):
    """Local rows of some blocks of a logical matrix, the same number from every block.

    Attributes:
        matrix: these rows as a logical matrix [blocks, rows a block, n].
        at: their positions among the local rows of the weight, block by block: a slice, or indices.
        block_index: which blocks of the logical matrix these are: a slice, or indices.
        name: seeds random streams; unique over all pieces and processes.
        prefix: of their keys in the state of the weight.
    """

    matrix: LogicalMatrix
    at: Any
    block_index: Any
    name: str
    prefix: str

    def of(self, rows: Tensor) -> Tensor:
        """These rows out of [local rows, ...]: a view where ``at`` is a slice, else a copy."""
        if isinstance(self.at, slice) and len(rows) == self.matrix.length:
            return rows
        return rows[self.at]


def stored_rows(matrix: LogicalMatrix, total_rows: int) -> Tensor:
    """For every logical row its row in the stored weight, int64 [blocks, block rows], on the CPU."""
    outer = torch.arange(matrix.outer, dtype=torch.int64, device="cpu")[:, None] * (total_rows // matrix.outer)
    inner = matrix.start + torch.arange(matrix.length, dtype=torch.int64, device="cpu")
    return (outer + inner).reshape(matrix.blocks, matrix.block_rows)


@functools.lru_cache(maxsize=1 << 14)
def local_rows(
    matrix: LogicalMatrix, name: str, total_rows: int, first: int, count: int, device: torch.device
) -> list[Rows]:
    """The local rows of a logical matrix, as one ``Rows`` for all blocks with the same number of local rows.

    Args:
        matrix: projected on the right, not transposed.
        name: of its weight.
        total_rows: of the stored weight.
        first, count: the local rows of the stored weight are ``first:first + count``.
        device: of the indices in the result. Indices on another device than the rows would make each step wait.
    """
    local = stored_rows(matrix, total_rows) - first
    is_local = (local >= 0) & (local < count)  # [blocks, block rows]
    counts = is_local.sum(dim=1)
    parts: list[Rows] = []
    for rows_per_block in sorted({int(c) for c in counts if c}):
        blocks = (counts == rows_per_block).nonzero().flatten()
        at = torch.cat([local[b][is_local[b]] for b in blocks])
        piece = LogicalMatrix(
            label=matrix.label, length=len(at), columns=matrix.columns, rank=matrix.rank, blocks=len(blocks)
        )
        logical = f"{matrix.logical(name)}@{first + int(at[0])}"
        prefix = f"{matrix.prefix}@{len(parts)}."
        parts.append(Rows(piece, _as_slice(at, device), _as_slice(blocks, device), logical, prefix))
    return parts


def _as_slice(index: Tensor, device: torch.device) -> Any:
    """Consecutive indices as a slice, which indexes without a copy; other indices on a device."""
    start, length = int(index[0]), len(index)
    is_range = torch.equal(index, torch.arange(start, start + length, dtype=torch.int64, device="cpu"))
    return slice(start, start + length) if is_range else index.to(device)
