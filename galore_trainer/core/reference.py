"""The step of ``core`` (projection, scaled and sparse residual) in float64, slow and literal: the oracle of the tests.

One class moves one 2-D matrix with one basis, one equation a line. It shares no code with what it checks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class ReferenceMatrix:
    """A weight under GaLore-AdamW in float64.

    Args:
        W: initial weight, m x n.
        side: ``right`` or ``left``.
        lr, scale, betas, eps, weight_decay: as for the optimizer.
        momentum_transfer: ``keep``, ``align``, ``rotate`` or ``reset``.
        residual_scale: factor on the residual's update.
        scaled: whether the dense scaled residual moves the weight.
        residual_mode: ``separate`` or ``moments``.

    Attributes:
        d: ||phi D|| of all blocks in the step before; 0 before the first one.
        A: moving average of the dense D = G - lift(R) since the first basis, for the choice of a support.
        S: rows and columns of the residual's entries; None before ``choose_support``.
    """

    def __init__(
        self,
        W: Tensor,
        side: str,
        *,
        lr: float,
        scale: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_transfer: str = "keep",
        residual_scale: float = 1.0,
        scaled: bool = False,
        residual_mode: str = "separate",
    ) -> None:
        self.W, self.side = W.double().clone(), side
        self.lr, self.scale, self.eps, self.weight_decay = lr, scale, eps, weight_decay
        self.b1, self.b2 = betas
        self.momentum_transfer = momentum_transfer
        self.residual_scale, self.scaled, self.residual_mode = residual_scale, scaled, residual_mode
        self.d = 0.0
        self.A = torch.zeros_like(self.W)
        self.S: tuple[Tensor, Tensor] | None = None
        self.P: Tensor | None = None
        self.t = 0

    def refresh(self, P_new: Tensor) -> None:
        """Replace the basis and carry the moments over by ``momentum_transfer``."""
        P_new = P_new.double().clone()
        if self.P is None:
            rank = P_new.shape[1]
            m, n = self.W.shape
            shape = (m, rank) if self.side == "right" else (rank, n)
            self.M = torch.zeros(shape, dtype=torch.float64)
            self.V = torch.zeros(shape, dtype=torch.float64)
        elif self.momentum_transfer == "reset":
            self.M.zero_()
            self.V.zero_()
            self.t = 0
            if self.S is not None:
                self.choose_support(*self.S)
        elif self.momentum_transfer == "align":
            for j in range(P_new.shape[1]):
                if torch.dot(self.P[:, j], P_new[:, j]) < 0:
                    P_new[:, j] = -P_new[:, j]
        elif self.momentum_transfer == "rotate":
            C = self.P.T @ P_new
            M_hat = self.M / (1 - self.b1**self.t)
            V_hat = self.V / (1 - self.b2**self.t)
            if self.side == "right":
                self.M = self.M @ C
                variance = (V_hat - M_hat**2) @ C**2
            else:
                self.M = C.T @ self.M
                variance = (C**2).T @ (V_hat - M_hat**2)
            M_hat_new = self.M / (1 - self.b1**self.t)
            self.V = (1 - self.b2**self.t) * torch.abs(variance + M_hat_new**2)
        self.P = P_new

    def choose_support(self, rows: Tensor, columns: Tensor) -> None:
        """Set the support S, with moments of zero."""
        self.S = (rows, columns)
        self.m_S = torch.zeros(rows.shape, dtype=torch.float64)
        self.v_S = torch.zeros(rows.shape, dtype=torch.float64)
        self.u = 0

    def step(self, G: Tensor) -> None:
        """One update of the weight with the gradient ``G``, m x n."""
        step_blocks([self], [G])

    def take_in(self, G: Tensor) -> None:
        """First half of a step: the moments, the update N, and phi without its limit."""
        assert self.P is not None, "refresh first"
        G = self.G = G.double()
        self.t += 1
        R = G @ self.P if self.side == "right" else self.P.T @ G
        self.M = self.b1 * self.M + (1 - self.b1) * R
        self.V = self.b2 * self.V + (1 - self.b2) * R * R
        M_hat = self.M / (1 - self.b1**self.t)
        V_hat = self.V / (1 - self.b2**self.t)
        self.N = M_hat / (torch.sqrt(V_hat) + self.eps)
        self.D = G - (R @ self.P.T if self.side == "right" else self.P @ R)
        self.A = self.b1 * self.A + (1 - self.b1) * self.D
        along = 1 if self.side == "right" else 0
        norm_N, norm_R = self.N.norm(dim=along, keepdim=True), R.norm(dim=along, keepdim=True)
        self.phi = torch.where(norm_R > 0, self.residual_scale * norm_N / norm_R, 0.0)

    def move(self, factor: float) -> None:
        """Second half of a step; ``factor`` limits phi."""
        assert self.P is not None
        lifted = self.N @ self.P.T if self.side == "right" else self.P @ self.N
        if self.S is not None and self.residual_mode == "moments":
            lifted[self.S] = self.corrected()
        W = self.W - self.lr * self.weight_decay * self.W - self.lr * self.scale * lifted
        if self.scaled:
            lost = factor * self.phi * self.D
            if self.S is not None:
                lost[self.S] = 0.0
            W -= self.lr * self.scale * lost
        if self.S is not None and self.residual_mode == "separate":
            self.u += 1
            self.m_S = self.b1 * self.m_S + (1 - self.b1) * self.D[self.S]
            self.v_S = self.b2 * self.v_S + (1 - self.b2) * self.D[self.S] ** 2
            m_hat = self.m_S / (1 - self.b1**self.u)
            v_hat = self.v_S / (1 - self.b2**self.u)
            W[self.S] -= self.lr * self.scale * self.residual_scale * m_hat / (torch.sqrt(v_hat) + self.eps)
        self.W = W

    def corrected(self) -> Tensor:
        """The update at S of moments that D corrects, as it is multiplied by lr x scale."""
        assert self.P is not None
        assert self.S is not None
        self.u += 1
        self.m_S = self.b1 * self.m_S + (1 - self.b1) * self.D[self.S]
        self.v_S = self.b2 * self.v_S + (1 - self.b2) * self.G[self.S] ** 2
        M_hat = self.M / (1 - self.b1**self.t)
        M_full = M_hat @ self.P.T if self.side == "right" else self.P @ M_hat
        first = M_full[self.S] + self.m_S / (1 - self.b1**self.u)
        second = self.v_S / (1 - self.b2**self.u)
        size = self.residual_scale * math.sqrt(self.P.shape[1] / self.P.shape[0])
        return size * first / (torch.sqrt(second) + self.eps)


def step_blocks(blocks: Sequence[ReferenceMatrix], grads: Sequence[Tensor]) -> float:
    """One update of the blocks of a logical matrix, which limit the growth of the scaled residual together.

    Returns:
        The factor of the limit, 1.0 where it was not met.
    """
    for block, G in zip(blocks, grads, strict=True):
        block.take_in(G)
    before = blocks[0].d
    d = math.sqrt(sum(float((block.phi * block.D).norm()) ** 2 for block in blocks))
    factor = 1.01 * before / d if before > 0.0 and d > 1.01 * before else 1.0
    for block in blocks:
        block.d = factor * d if d > 0.0 else before
        block.move(factor)
    return factor
