"""Selected entries of a stack of matrices: where they are, reading them, adding to them.

A support holds int32 positions [blocks, lines, k], distinct within a line.
Row-balanced: the lines are the m rows, and a position is a column.
Global: the whole matrix is one line, and a position is row * n + column.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Support(NamedTuple):
    """Positions S of selected entries in matrices [blocks, m, n].

    Attributes:
        positions: [blocks, lines, k], int32 or int64.
        columns: n.
    """

    positions: Tensor
    columns: int

    def wide(self) -> Support:
        """The same with int64 positions, which torch's indexing needs: converts once for several uses."""
        return Support(self.positions.long(), self.columns)

    def by_row(self, rows: int) -> bool:
        """Whether the support is row-balanced, in matrices of ``rows`` rows."""
        return self.positions.shape[-2] == rows

    def lines_of(self, X: Tensor) -> Tensor:
        """X [blocks, m, n] by lines: X itself, or [blocks, 1, m n] (a view where strides allow)."""
        return X if self.by_row(X.shape[-2]) else X.reshape(len(X), 1, -1)

    def coordinates(self, rows: int) -> tuple[Tensor, Tensor]:
        """Row and column of every entry in matrices of ``rows`` rows: two int64 tensors [blocks, lines, k]."""
        index = self.positions.long()
        if self.by_row(rows):
            return torch.arange(rows, dtype=torch.int64, device=index.device)[:, None].expand_as(index), index
        return index // self.columns, index % self.columns


def read_at(X: Tensor, support: Support) -> Tensor:
    """X[S], [blocks, lines, k]."""
    return support.lines_of(X).gather(-1, support.positions.long())


def add_at_(W: Tensor, support: Support, values: Tensor, alpha: float) -> None:
    """W[S] += alpha values, in place.

    Args:
        W: [blocks, m, n], of any strides.
        support: S.
        values: [blocks, lines, k], in the dtype of W.
        alpha: factor.
    """
    lines, index = support.lines_of(W), support.positions.long()
    if W.device.type == "cpu":
        lines.scatter_add_(-1, index, alpha * values)
    else:  # scatter_add_ is nondeterministic on a GPU, and ``use_deterministic_algorithms`` may forbid it
        lines.scatter_(-1, index, lines.gather(-1, index).add_(values, alpha=alpha))
    if lines.untyped_storage()._cdata != W.untyped_storage()._cdata:
        W.copy_(lines.view(W.shape))


def part_of(sparse: tuple[Support, Tensor] | None, i: int, blocks: int) -> tuple[Support, Tensor] | None:
    """The part of a support and its values that belongs to matrix ``i``, where matrices of ``blocks`` are stacked."""
    if sparse is None or len(sparse[1]) == blocks:
        return sparse
    (index, columns), values = sparse
    part = slice(i * blocks, (i + 1) * blocks)
    return Support(index[part], columns), values[part]
