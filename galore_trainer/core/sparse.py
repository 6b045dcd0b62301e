"""Positions inside a stack of matrices: read there, add there.

A support holds int32 positions [blocks, lines, k], distinct in every line. Row-balanced: lines = m rows, a position is
a column. Global: lines = 1, a position is row * n + column.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Support(NamedTuple):
    """Where matrices of ``columns`` columns are sampled."""

    positions: Tensor
    columns: int

    def wide(self) -> Support:
        """With int64 positions, which indexing takes as they are."""
        return Support(self.positions.long(), self.columns)

    def by_row(self, rows: int) -> bool:
        """Whether positions are columns, the same number in each of ``rows`` rows."""
        return self.positions.shape[-2] == rows

    def lines_of(self, X: Tensor) -> Tensor:
        """X [blocks, m, n] as the positions count it: itself, or [blocks, 1, m n]; a view where strides allow."""
        return X if self.by_row(X.shape[-2]) else X.reshape(len(X), 1, -1)

    def coordinates(self, rows: int) -> tuple[Tensor, Tensor]:
        """Row and column of every entry of matrices with ``rows`` rows, int64, each of the positions' shape."""
        index = self.positions.long()
        if self.by_row(rows):
            return torch.arange(rows, dtype=torch.int64, device=index.device)[:, None].expand_as(index), index
        return index // self.columns, index % self.columns


def read_at(X: Tensor, support: Support) -> Tensor:
    """X[S], [blocks, lines, k]."""
    return support.lines_of(X).gather(-1, support.positions.long())


def add_at_(W: Tensor, support: Support, values: Tensor, alpha: float) -> None:
    """W[S] += alpha values, in place, whatever the strides of W [blocks, m, n]; values in the dtype of W."""
    lines, index = support.lines_of(W), support.positions.long()
    if W.device.type == "cpu":
        lines.scatter_add_(-1, index, alpha * values)
    else:  # elsewhere torch adds in no fixed order, and can be told to refuse that
        lines.scatter_(-1, index, lines.gather(-1, index).add_(values, alpha=alpha))
    if lines.untyped_storage()._cdata != W.untyped_storage()._cdata:
        W.copy_(lines.view(W.shape))


def part_of(sparse: tuple[Support, Tensor] | None, i: int, blocks: int) -> tuple[Support, Tensor] | None:
    """Support and values of the i-th of several matrices of ``blocks`` blocks each, joined along the blocks."""
    if sparse is None or len(sparse[1]) == blocks:
        return sparse
    (index, columns), values = sparse
    here = slice(i * blocks, (i + 1) * blocks)
    return Support(index[here], columns), values[here]
