"""Orthonormal columns and products against float64, where a GPU takes other paths than a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from galore_trainer.core import linalg


def matrix(condition: float, rows: int = 200, k: int = 24) -> Tensor:
    """Two random matrices [2, rows, k] with singular values from 1 down to 1 / condition."""
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(2, rows, k, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(2, k, k, generator=generator, dtype=torch.float64)).Q
    return (left * torch.logspace(0, -torch.tensor(condition).log10().item(), k) @ right).float()


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_cholesky_factors_span_what_householder_spans(condition: float) -> None:
    """Orthonormal to float32, and in the same space up to what float32 knows of it."""
    A = matrix(condition)
    Q, H = linalg.by_cholesky(A), torch.linalg.qr(A.double()).Q
    assert (Q.double().mT @ Q.double() - torch.eye(24)).abs().max() < 1e-6
    assert torch.linalg.matrix_norm(H @ (H.mT @ Q.double()) - Q.double(), 2).max() < 1e-6


def test_dependent_columns_are_left_to_householder() -> None:
    """A zero column, a repeated one, a number that is none: that matrix is NaN, the other of the stack is not."""
    for spoil in (
        lambda A: A[1, :, 3].zero_(),
        lambda A: A[1, :, 3].copy_(A[1, :, 5]),
        lambda A: A[0].fill_(0.0),
        lambda A: A[0, 0, 0].fill_(float("nan")),
    ):
        A = matrix(10.0)
        spoil(A)
        failed = torch.isnan(linalg.by_cholesky(A)).all(dim=(1, 2))
        assert failed.tolist().count(True) == 1


@pytest.mark.parametrize("across", [False, True])
def test_a_product_with_bfloat16_rounds_nothing_away(across: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three bfloat16 numbers hold a float32: as accurate as the product in float32, in parts or whole."""

    def exact_products(A: Tensor, B: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert A.dtype == B.dtype == torch.bfloat16
        return torch.matmul(A.to(out_dtype), B.to(out_dtype))

    monkeypatch.setattr(torch, "bmm", exact_products)  # test-only: a CPU's has no out_dtype
    generator = torch.Generator().manual_seed(5)
    G = torch.randn(3, 40, 56, generator=generator).bfloat16()
    G = G.mT if across else G
    X = torch.randn(3, G.shape[-1], 7, generator=generator)
    right = G.double() @ X.double()
    plain = (G.float() @ X - right).norm()
    monkeypatch.setattr(linalg, "MULTIPLIES_BF16", {"cpu"})
    monkeypatch.setattr("galore_trainer.core.galore.MULTIPLIES_BF16", {"cpu"})
    assert linalg.factor(G).dtype == torch.bfloat16
    for parts in ([G], [G[:1], G[1:]]):
        assert (linalg.product(parts, X) - right).norm() < 2 * plain
