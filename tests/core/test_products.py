"""Products in ``compute_dtype`` and norms of lines, whichever library and chunks make them."""

from __future__ import annotations

import pytest
import torch

from galore_trainer.core import scaled
from galore_trainer.core.galore import matmul_wide

ROUNDING = 48 * 2.0**-24 * 16.0  # of float32 sums of 48 products of numbers below 4


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("left", ["contiguous", "transposed"])
@pytest.mark.parametrize("right", ["contiguous", "transposed"])
@pytest.mark.parametrize("rows", [0, 1, 7, 65])
def test_product_equals_float64(blocks: int, left: str, right: str, rows: int) -> None:
    torch.manual_seed(0)
    A = torch.randn(blocks, rows, 48) if left == "contiguous" else torch.randn(blocks, 48, rows).mT
    B = torch.randn(blocks, 48, 5) if right == "contiguous" else torch.randn(blocks, 5, 48).mT
    product, exact = matmul_wide(A, B), A.double() @ B.double()
    assert product.dtype == torch.float32
    assert product.shape == exact.shape
    torch.testing.assert_close(product.double(), exact, rtol=0.0, atol=ROUNDING)


@pytest.mark.parametrize("side", ["right", "left"])
def test_squared_norms_of_lines_in_chunks(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled, "CHUNK", 64)  # several chunks, the last one smaller
    X = torch.randn(2, 13, 11, generator=torch.Generator().manual_seed(0))
    expected = X.double().square().sum(-1 if side == "right" else -2)
    torch.testing.assert_close(scaled.squared_norms(X, side, torch.float32).double(), expected, rtol=1e-6, atol=0.0)
