"""Small dense linear algebra on stacks of matrices: orthonormal columns, thin singular vectors, subspace iteration.

Legend: ``G`` is a gradient [..., m, n], ``Q`` has orthonormal columns, ``k`` is the width of a sketch, ``r`` the rank.
All functions accept leading batch dimensions and leave their arguments unchanged. Unless stated otherwise they compute
in float32, and in float64 for float64 arguments.

Where the rows of ``G`` lie on several processes, every process passes its local rows and ``reduce``, which sums a
tensor over the processes. Only n x k and k x k tensors are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from galore_trainer.core.galore import MULTIPLIES_BF16, matmul_wide, widen

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that hold rows of a matrix (all-reduce)."""

Orthonormalize = Callable[[Tensor, Reduce | None], Tensor]
"""Orthonormal columns that span the columns of a matrix [..., rows, k], rows >= k, in its shape and dtype. With a
``Reduce`` argument and result are the local rows."""

Eigenvectors = Callable[[Tensor], Tensor]
"""Eigenvectors of symmetric float64 matrices [..., k, k], as columns in order of falling eigenvalue, with arbitrary
signs, in float32 or float64."""

NEARLY_ORTHONORMAL = 1e-3  # largest ||Q^T Q - I|| that one further Cholesky factor corrects to rounding
SMALLEST_EIGENVALUE = 1e-12  # relative to the largest one of a Gram matrix: below it directions are float32 noise


def factor(G: Tensor) -> Tensor:
    """A gradient as ``product`` takes it: bfloat16 stays where the device multiplies it; others are widened."""
    return G if G.dtype == torch.bfloat16 and G.device.type in MULTIPLIES_BF16 else widen(G)


def product(G: Sequence[Tensor], X: Tensor) -> Tensor:
    """G X in the dtype of X, [blocks, m, k].

    A bfloat16 G is multiplied on tensor cores without rounding X: the 24 significant bits of X are split into three
    bfloat16 numbers.

    Args:
        G: tensors of one stack along the blocks, as ``factor`` returns them. They are not joined, which would copy.
        X: [blocks, n, k]: float64 where G is, else float32.
    """
    split = G[0].dtype == torch.bfloat16
    factors = (_three_bf16(X) if split else X).split([len(part) for part in G])
    products = [matmul_wide(part, x) for part, x in zip(G, factors, strict=True)]
    joined = products[0] if len(products) == 1 else torch.cat(products)
    return joined.unflatten(-1, (3, -1)).sum(dim=-2) if split else joined


def _three_bf16(X: Tensor) -> Tensor:
    """float32 [..., k] as three bfloat16 summands [..., 3 k], the largest first."""
    high = X.bfloat16()
    rest = X - high
    middle = rest.bfloat16()
    return torch.cat([high, middle, (rest - middle).bfloat16()], dim=-1)


def by_householder(A: Tensor, reduce: Reduce | None = None) -> Tensor:
    """``Orthonormalize`` by QR; across processes by whitening, since QR needs all rows in one place."""
    return torch.linalg.qr(A, mode="reduced").Q if reduce is None else by_whitening(A, reduce)


def by_cholesky(A: Tensor, reduce: Reduce | None = None) -> Tensor:
    """``Orthonormalize`` by CholeskyQR2 in float64: fast on a GPU, NaN where columns are nearly dependent.

    The first Cholesky factor leaves an error of about 2^-53 times the squared condition number. The second factor
    corrects errors below ``NEARLY_ORTHONORMAL`` (Yamamoto et al. 2015, "Roundoff error analysis of the CholeskyQR2
    algorithm").
    """
    Q = A.double()
    identity = torch.eye(A.shape[-1], dtype=Q.dtype, device=Q.device)
    for _ in range(2):
        gram = Q.mT @ Q if reduce is None else reduce(Q.mT @ Q)
        L = torch.linalg.cholesky_ex(gram).L
        Q = Q @ torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False).mT
    error = torch.linalg.matrix_norm(gram - identity, keepdim=True)  # what the first factor left
    return torch.where(error < NEARLY_ORTHONORMAL, Q, torch.nan).to(A.dtype)


def by_whitening(A: Tensor, reduce: Reduce) -> Tensor:
    """``Orthonormalize`` across processes, by eigenvectors of the Gram matrix.

    A direction that A does not span becomes a column of zeros.
    """
    for _ in range(2):  # the first pass leaves an error that grows with the squared condition number
        wide = A.double()
        values, vectors = torch.linalg.eigh(reduce(wide.mT @ wide))  # [..., k], [..., k, k]
        kept = values > SMALLEST_EIGENVALUE * values[..., -1:].clamp(min=torch.finfo(torch.float32).tiny)
        scale = torch.where(kept, values.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
        A = (wide @ (vectors * scale.unsqueeze(-2))).to(A.dtype)
    return A


def by_eigh(C: Tensor) -> Tensor:
    """``Eigenvectors`` by torch, which decomposes one matrix after the other."""
    return torch.linalg.eigh(C).eigenvectors.flip(-1)  # torch sorts by rising eigenvalue


class Tools(NamedTuple):
    """Routines for small factorizations: ``CERTAIN`` always succeeds; faster ones may return NaN."""

    orthonormalize: Orthonormalize = by_householder
    eigenvectors: Eigenvectors = by_eigh


CERTAIN = Tools()


def thin_singular_vectors(B: Tensor, rank: int, tools: Tools = CERTAIN) -> tuple[Tensor, Tensor]:
    """The leading left and right singular vectors of a wide matrix, through its k x k Gram matrix.

    A Gram matrix squares the condition number, hence float64. Signs are arbitrary.

    Args:
        B: [..., k, n] with k <= n, float32 or float64.
        rank: number of vectors, at most k.
        tools: routines for the Gram matrix and for the columns of V.

    Returns:
        U [..., k, rank] and V [..., n, rank], in the dtype of B.
    """
    U = tools.eigenvectors(gram_of_rows(B))[..., :rank].to(B.dtype)  # [..., k, rank]
    return U, right_vectors(B, U, tools)


def gram_of_rows(B: Tensor) -> Tensor:
    """B B^T in float64, [..., k, k]."""
    wide = B.double()
    return wide @ wide.mT


def right_vectors(B: Tensor, U: Tensor, tools: Tools) -> Tensor:
    """The right singular vectors that belong to left ones: B^T U, whose columns are orthogonal, scaled to length 1."""
    return tools.orthonormalize(B.mT @ U, None)


def least_error(G: Tensor, rank: int, parts: int = 1) -> Tensor:
    """The relative Frobenius error of the best approximation of every block of G by a given rank.

    By Eckart-Young the eigenvalues of the smaller Gram matrix suffice; they are computed in float64.

    Args:
        G: [blocks, m, n].
        rank: at most min(m, n).
        parts: number of equal parts along the blocks.

    Returns:
        One error for each part, over all its blocks: [parts], float32.
    """
    thin = (G if G.shape[-2] <= G.shape[-1] else G.mT).double()
    energies = torch.linalg.eigvalsh(thin @ thin.mT).clamp(min=0.0)  # [blocks, k], ascending
    lost = energies[..., : energies.shape[-1] - rank].reshape(parts, -1).sum(dim=1)
    return (lost / energies.reshape(parts, -1).sum(dim=1)).sqrt().float()


def subspace_iteration(
    G: Sequence[Tensor], Y: Tensor, iterations: int, tools: Tools = CERTAIN, reduce: Reduce | None = None
) -> Tensor:
    """An orthonormal basis of the dominant column space of ``G``.

    Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithm 4.4: every product is orthonormalised.

    Args:
        G: tensors that together are [blocks, m, n], as ``product`` takes them.
        Y: samples of the column space [blocks, m, k], usually G times a Gaussian test matrix.
        iterations: power iterations q; 0 is the plain range finder.
        tools: routines for orthonormal columns.
        reduce: sums over processes, where G and Y hold only the local rows; None where they hold all rows.

    Returns:
        Q [blocks, m, k], for the same rows as Y.
    """
    across = [part.mT for part in G]
    Q = tools.orthonormalize(Y, reduce)  # [..., m, k]
    for _ in range(iterations):
        Z = product(across, Q)
        Z = tools.orthonormalize(Z if reduce is None else reduce(Z), None)  # [..., n, k]
        Q = tools.orthonormalize(product(G, Z), reduce)  # [..., m, k]
    return Q
