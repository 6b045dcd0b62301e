"""Eigenvectors of many matrices at once against float64's, and a refresh that uses them."""

from __future__ import annotations

import functools

import pytest
import torch

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.basis import exact
from galore_trainer.core.linalg import CERTAIN, thin_singular_vectors
from galore_trainer.kernels.jacobi import eigenvectors
from galore_trainer.optim.refresh import certain, tools_for


def factors(k: int, n: int, smallest: float, device: torch.device, count: int = 3) -> torch.Tensor:
    """Random matrices [count, k, n] with singular values from 1 down to the smallest, evenly in the logarithm."""
    generator = torch.Generator().manual_seed(k)
    left = torch.linalg.qr(torch.randn(count, k, k, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(count, n, k, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.logspace(0, torch.tensor(smallest).log10().item(), k, dtype=torch.float64)
    return ((left * spectrum) @ right.mT).to(device)


@pytest.mark.parametrize(
    ("k", "smallest", "count"), [(2, 0.5, 3), (3, 1e-3, 3), (16, 1e-4, 1), (17, 1e-2, 1), (34, 0.1, 1)]
)
def test_eigenvectors_are_float64s(k: int, smallest: float, count: int, device: torch.device) -> None:
    """Even and odd sizes; float32's error over the gap between neighbouring eigenvalues, columns orthonormal."""
    B = factors(k, k + 5, smallest, device, count)
    C = B @ B.mT
    found, right = eigenvectors(C), torch.linalg.eigh(C).eigenvectors.flip(-1)
    overlap = (found.double() * right).sum(dim=1).abs()
    assert (overlap - 1.0).abs().max() < 1e-5
    assert (found.double().mT @ found.double() - torch.eye(k, device=device)).abs().max() < 1e-4


def test_a_cluster_of_eigenvalues_is_spanned(device: torch.device) -> None:
    """Equal eigenvalues have no vectors of their own; the space that they share is found."""
    k = 12
    turn = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    values = torch.tensor([4.0] * 5 + [1.0] * 7, dtype=torch.float64)
    C = ((turn * values) @ turn.mT)[None].to(device)
    found = eigenvectors(C)
    spanned = found[0, :, :5].double() @ found[0, :, :5].double().mT
    assert (spanned - (turn[:, :5] @ turn[:, :5].mT).to(device)).abs().max() < 1e-6


def test_a_singular_matrix_is_left_to_the_library(device: torch.device) -> None:
    """It alone is NaN; a refresh that meets one is made again, as without the kernel."""
    B = factors(8, 20, 0.1, device, count=4).float()
    B[2, 5] = 0.0
    C = (B @ B.mT).double()
    assert torch.isnan(eigenvectors(C)).all(dim=(1, 2)).tolist() == [False, False, True, False]
    tools = tools_for(GaLoreConfig(kernels="triton", rank=4), device)
    assert tools != CERTAIN
    find = functools.partial(exact, [B], 4, "right")
    found = certain(find(tools=tools), find, tools)
    assert torch.equal(found, exact([B], 4, "right"))


def test_few_matrices_are_left_to_the_library(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is slower than the library on one matrix; where it is asked it finds the same vectors."""
    asked = []

    def counted(C: torch.Tensor) -> torch.Tensor:
        asked.append(len(C))
        return eigenvectors(C)

    monkeypatch.setattr("galore_trainer.kernels.jacobi.eigenvectors", counted)
    monkeypatch.setattr("galore_trainer.optim.refresh.LIBRARY", 60)
    tools = tools_for(GaLoreConfig(kernels="triton", rank=4), device)
    for count in (1, 3, 4):
        B = factors(6, 20, 0.05, device, count).float()
        (U, V), (U_right, V_right) = thin_singular_vectors(B, 6, tools), thin_singular_vectors(B, 6)
        for found, right in ((U, U_right), (V, V_right)):
            assert ((found * right).sum(dim=1).abs() - 1.0).abs().max() < 1e-5
    assert asked == [4]
