"""Small dense linear algebra on stacks of matrices: orthonormal columns, thin singular vectors, subspace iteration.

Legend: ``G`` is a gradient [..., m, n], ``Q`` has orthonormal columns, ``k`` is the width of a sketch, ``r`` the rank.
All functions take leading batch dimensions, compute in float32 unless said otherwise, and change no argument.

Where the rows of ``G`` lie on several processes, each passes its own rows and ``reduce``, which sums a tensor over the
processes. Only n x k and k x k tensors are summed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that hold a matrix's rows; each gets the sum."""

LEAST_SHARE = 1e-12  # of the largest eigenvalue of a Gram matrix: directions below it are noise of float32


def orthonormalize(A: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Orthonormal columns that span the columns of ``A``.

    Householder QR, so zero columns do no harm. Across processes QR would need all rows; there the Gram matrix whitens
    the columns, in float64 and twice, as once leaves the square of the condition number as an error.

    Args:
        A: [..., rows, k] with rows >= k, float32.
        reduce: the rows of A are this process's; None where they are all.

    Returns:
        Q [..., rows, k]; with ``reduce``, a direction that A does not span is a column of zeros.
    """
    if reduce is None:
        return torch.linalg.qr(A, mode="reduced").Q
    for _ in range(2):
        wide = A.double()
        values, vectors = torch.linalg.eigh(reduce(wide.mT @ wide))  # [..., k], [..., k, k]
        kept = values > LEAST_SHARE * values[..., -1:].clamp(min=torch.finfo(torch.float32).tiny)
        scale = torch.where(kept, values.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
        A = (wide @ (vectors * scale.unsqueeze(-2))).to(A.dtype)
    return A


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


def subspace_iteration(G: Tensor, Y: Tensor, iterations: int, reduce: Reduce | None = None) -> Tensor:
    """An orthonormal basis of the dominant column space of ``G``.

    Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithm 4.4: each product is orthonormalised.

    Args:
        G: [..., m, n] float32.
        Y: samples of its columns [..., m, k], as a rule G times a Gaussian test matrix.
        iterations: power iterations q; 0 is the plain range finder.
        reduce: G and Y are this process's rows; None where they are all.

    Returns:
        Q [..., m, k], of the rows that were passed.
    """
    total = reduce or _whole
    Q = orthonormalize(Y, reduce)  # [..., m, k]
    for _ in range(iterations):
        Z = orthonormalize(total(G.mT @ Q))  # [..., n, k]
        Q = orthonormalize(G @ Z, reduce)  # [..., m, k]
    return Q


def _whole(x: Tensor) -> Tensor:
    return x
