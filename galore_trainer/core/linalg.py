"""Small dense linear algebra on stacks of matrices: orthonormal columns, thin singular vectors, subspace iteration.

Legend: ``G`` is a gradient [..., m, n], ``Q`` has orthonormal columns, ``k`` is the width of a sketch, ``r`` the rank.
All functions take leading batch dimensions, compute in float32 unless said otherwise, and change no argument.

Where the rows of ``G`` lie on several processes, each passes its own rows and ``reduce``, which sums a tensor over the
processes. Only n x k and k x k tensors are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from galore_trainer.core.galore import MULTIPLIES_BF16, matmul_fp32

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that hold a matrix's rows; each gets the sum."""

Eigenvectors = Callable[[Tensor], Tensor]
"""Eigenvectors of symmetric matrices [..., k, k], float64: columns by falling eigenvalue, float32, of any sign."""

NEARLY = 1e-3  # of one: how far columns may be from orthonormal before the last Cholesky factor
LEAST_SHARE = 1e-12  # of the largest eigenvalue of a Gram matrix: directions below it are noise of float32


def factor(G: Tensor) -> Tensor:
    """A gradient as ``product`` multiplies it: in bfloat16 where it is and the device can, else in float32."""
    return G if G.dtype == torch.bfloat16 and G.device.type in MULTIPLIES_BF16 else G.float()


def product(G: Sequence[Tensor], X: Tensor) -> Tensor:
    """G X in float32, [blocks, m, k].

    Where the device multiplies bfloat16, a bfloat16 ``G`` stays what it is, and the 24 bits of ``X`` become three
    bfloat16 numbers beside each other: tensor cores, and nothing rounded away.

    Args:
        G: parts of one stack, each [its blocks, m, n] as ``factor`` gives them; they are not joined.
        X: [blocks, n, k], float32.
    """
    found = [_product(part, x) for part, x in zip(G, X.split([len(part) for part in G]), strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _product(G: Tensor, X: Tensor) -> Tensor:
    if G.dtype != torch.bfloat16:
        return G @ X
    high = X.bfloat16()
    middle = (X - high.float()).bfloat16()
    low = (X - high.float() - middle.float()).bfloat16()
    parts: Tensor = matmul_fp32(G, torch.cat([high, middle, low], dim=-1))
    return parts.unflatten(-1, (3, -1)).sum(dim=-2)


def orthonormalize(A: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Orthonormal columns that span the columns of ``A``.

    Householder QR on a CPU; on a GPU, where that is slow, by Cholesky factors of the Gram matrix, unless the columns
    are too close to dependent for them. Across processes QR would need all rows; there eigenvectors of the Gram matrix
    whiten the columns.

    Args:
        A: [..., rows, k] with rows >= k, float32.
        reduce: the rows of A are this process's; None where they are all.

    Returns:
        Q [..., rows, k]; with ``reduce``, a direction that A does not span is a column of zeros.
    """
    if reduce is not None:
        return _by_whitening(A, reduce)
    Q = by_cholesky(A) if A.is_cuda else None
    return torch.linalg.qr(A, mode="reduced").Q if Q is None else Q


def by_cholesky(A: Tensor) -> Tensor | None:
    """Orthonormal columns from two Cholesky factors in float64; None where one of the stack needs Householder QR.

    The first factor leaves an error of about 2^-53 times the square of the condition number, the second one none; it is
    there where the first left less than ``NEARLY`` (Yamamoto et al. 2015, "Roundoff error analysis of the CholeskyQR2
    algorithm"). Waits for the device once.
    """
    Q = A.double()
    identity = torch.eye(A.shape[-1], dtype=Q.dtype, device=Q.device)
    for _ in range(2):
        gram = Q.mT @ Q
        L = torch.linalg.cholesky_ex(gram).L
        Q = Q @ torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False).mT
    return Q.to(A.dtype) if bool(((gram - identity).abs() < NEARLY).all()) else None


def _by_whitening(A: Tensor, reduce: Reduce) -> Tensor:
    """In float64 and twice, as once leaves the square of the condition number as an error."""
    for _ in range(2):
        wide = A.double()
        values, vectors = torch.linalg.eigh(reduce(wide.mT @ wide))  # [..., k], [..., k, k]
        kept = values > LEAST_SHARE * values[..., -1:].clamp(min=torch.finfo(torch.float32).tiny)
        scale = torch.where(kept, values.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
        A = (wide @ (vectors * scale.unsqueeze(-2))).to(A.dtype)
    return A


def by_eigh(C: Tensor) -> Tensor:
    """``Eigenvectors`` by the library, one matrix after the other."""
    return torch.linalg.eigh(C).eigenvectors.flip(-1).float()  # it sorts them rising


def thin_singular_vectors(B: Tensor, rank: int, eigenvectors: Eigenvectors = by_eigh) -> tuple[Tensor, Tensor]:
    """The first ``rank`` left and right singular vectors of a wide matrix, through its k x k Gram matrix.

    The Gram matrix squares the condition number, so it is formed and decomposed in float64. Signs are arbitrary.

    Args:
        B: [..., k, n] with k <= n, float32.
        rank: at most k.
        eigenvectors: of the Gram matrices.

    Returns:
        U [..., k, rank] and V [..., n, rank], in float32.
    """
    wide = B.double()
    U = eigenvectors(wide @ wide.mT)[..., :rank]  # [..., k, rank]
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


def subspace_iteration(G: Sequence[Tensor], Y: Tensor, iterations: int, reduce: Reduce | None = None) -> Tensor:
    """An orthonormal basis of the dominant column space of ``G``.

    Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithm 4.4: each product is orthonormalised.

    Args:
        G: parts of [blocks, m, n], as ``product`` takes them.
        Y: samples of its columns [blocks, m, k], as a rule G times a Gaussian test matrix.
        iterations: power iterations q; 0 is the plain range finder.
        reduce: G and Y are this process's rows; None where they are all.

    Returns:
        Q [blocks, m, k], of the rows that were passed.
    """
    total = reduce or _whole
    across = [part.mT for part in G]
    Q = orthonormalize(Y, reduce)  # [..., m, k]
    for _ in range(iterations):
        Z = orthonormalize(total(product(across, Q)))  # [..., n, k]
        Q = orthonormalize(product(G, Z), reduce)  # [..., m, k]
    return Q


def _whole(x: Tensor) -> Tensor:
    return x
