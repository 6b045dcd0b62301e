"""Small dense linear algebra on stacks of matrices: orthonormal columns, thin singular vectors, subspace iteration.

Legend: ``G`` is a gradient [..., m, n], ``Q`` has orthonormal columns, ``k`` is the width of a sketch, ``r`` the rank.
All functions take leading batch dimensions, compute in float32 unless said otherwise, and change no argument.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormalize(A: Tensor) -> Tensor:
    """Orthonormal columns that span the columns of ``A`` (Householder QR, so zero columns do no harm).

    Args:
        A: [..., rows, k] with rows >= k, float32.

    Returns:
        Q [..., rows, k].
    """
    return torch.linalg.qr(A, mode="reduced").Q


def thin_singular_vectors(B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first ``rank`` left and right singular vectors of a wide matrix, through its k x k Gram matrix.

    The Gram matrix squares the condition number, so it is formed and decomposed in float64. Signs are arbitrary.

    Args:
        B: [..., k, n] with k <= n, float32.
        rank: at most k.

    Returns:
        U [..., k, rank] and V [..., n, rank], in float32.
    """
    wide = B.double()
    eigenvectors = torch.linalg.eigh(wide @ wide.mT).eigenvectors  # ascending eigenvalues
    U = eigenvectors.flip(-1)[..., :rank].to(B.dtype)  # [..., k, rank]
    return U, orthonormalize(B.mT @ U)  # columns of B^T U are orthogonal already: QR scales them to length one


def subspace_iteration(G: Tensor, omega: Tensor, iterations: int) -> Tensor:
    """An orthonormal basis of the dominant column space of ``G``.

    Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithm 4.4: each product is orthonormalised.

    Args:
        G: [..., m, n] float32.
        omega: Gaussian test matrix [..., n, k].
        iterations: power iterations q; 0 is the plain range finder.

    Returns:
        Q [..., m, k].
    """
    Q = orthonormalize(G @ omega)  # [..., m, k]
    for _ in range(iterations):
        Z = orthonormalize(G.mT @ Q)  # [..., n, k]
        Q = orthonormalize(G @ Z)  # [..., m, k]
    return Q
