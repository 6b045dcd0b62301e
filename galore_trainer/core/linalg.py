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


def least_error(G: Tensor, rank: int, parts: int = 1) -> Tensor:
    """The relative Frobenius error of the best rank-``rank`` approximation of each matrix, over parts of the stack.

    From the eigenvalues of the smaller Gram matrix in float64: no singular vectors are needed (Eckart-Young).

    Args:
        G: [blocks, m, n].
        rank: at most min(m, n).
        parts: the blocks fall into so many parts of equal size.

    Returns:
        [parts], float32.
    """
    thin = (G if G.shape[-2] <= G.shape[-1] else G.mT).double()
    energies = torch.linalg.eigvalsh(thin @ thin.mT).clamp(min=0.0)  # [blocks, k], ascending
    lost = energies[..., : energies.shape[-1] - rank].reshape(parts, -1).sum(dim=1)
    return (lost / energies.reshape(parts, -1).sum(dim=1)).sqrt().float()


def subspace_iteration(G: Tensor, Y: Tensor, iterations: int) -> Tensor:
    """An orthonormal basis of the dominant column space of ``G``.

    Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithm 4.4: each product is orthonormalised.

    Args:
        G: [..., m, n] float32.
        Y: samples of its columns [..., m, k], as a rule G times a Gaussian test matrix.
        iterations: power iterations q; 0 is the plain range finder.

    Returns:
        Q [..., m, k].
    """
    Q = orthonormalize(Y)  # [..., m, k]
    for _ in range(iterations):
        Z = orthonormalize(G.mT @ Q)  # [..., n, k]
        Q = orthonormalize(G @ Z)  # [..., m, k]
    return Q
