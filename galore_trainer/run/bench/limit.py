"""The least time of a step of projected weights: its bytes at the speed of a copy, its products on tensor cores.

A step has passes that must follow one another: project, moments, update, and the sparse residual where there is one.
A pass takes as long as its bytes or its products, whichever takes longer. R and N, which one pass writes and the next
reads, count once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.residual import INDEX
from galore_trainer.targets.matrices import has_scaled

PRODUCTS = 750e12  # operations a second of products of bfloat16 matrices, as cuBLAS reaches on a Hopper GPU
SECTOR = 32  # bytes that memory moves for one entry among others
WIDE = 4  # bytes of a float32


class Pass(NamedTuple):
    """What a pass has to do at least.

    Attributes:
        bytes: that it reads and writes.
        operations: of its matrix product.
    """

    bytes: int
    operations: int = 0


def passes(optimizer: GaLoreAdamW) -> dict[str, Pass]:
    """The passes of a step between two refreshes, over all projected weights.

    Args:
        optimizer: that has made a step, so that its state exists.
    """
    state = optimizer.state_bytes()
    weights = gradients = reread = projected = updates = products = 0
    for group in optimizer.param_groups:
        if not group["projected"]:
            continue
        for p, matrices in zip(group["params"], group["matrices"], strict=True):
            gradient = p.element_size() if p.grad is None else p.grad.element_size()
            weights += p.numel() * p.element_size()
            gradients += p.numel() * gradient
            for matrix in matrices:
                entries, moments = _entries(matrix)
                products += 2 * entries * matrix.rank
                projected += WIDE * moments
                updates += min(p.element_size(), WIDE) * moments
                reread += gradient * entries if has_scaled(matrix, optimizer.config) else 0
    found = {
        "project": Pass(gradients + state["basis"] + projected, products),
        "moments": Pass(2 * state["moments"]),
        "update": Pass(2 * weights + reread + updates + state["basis"], products),
    }
    supports = _supports(optimizer)
    if supports:
        index = sum(x.nbytes for x in supports)
        sectors = SECTOR * sum(x.numel() for x in supports)  # of G; the update moves all of W already
        found["residual"] = Pass(2 * (state["residual"] - index) + index + sectors)
    return found


def limit_ms(parts: dict[str, Pass], bandwidth: float) -> float:
    """Milliseconds of ``passes`` at so many bytes a second."""
    return 1e3 * sum(max(part.bytes / bandwidth, part.operations / PRODUCTS) for part in parts.values())


def _entries(matrix: LogicalMatrix) -> tuple[int, int]:
    """Entries of a matrix, and of its projected gradient."""
    blocks, rows, columns = matrix.moment_shape
    return matrix.rows * matrix.columns, blocks * rows * columns


def _supports(optimizer: GaLoreAdamW) -> list[torch.Tensor]:
    """Positions of the sparse residual of every matrix."""
    tensors = (x for state in optimizer.state.values() for key, x in state.items() if key.endswith(INDEX))
    return [x for x in tensors if isinstance(x, torch.Tensor)]
