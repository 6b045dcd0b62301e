"""Small dense linear algebra on stacks of matrices: orthonormal columns, thin singular vectors, subspace iteration.

Legend: ``G`` is a gradient [..., m, n], ``Q`` has orthonormal columns, ``k`` is the width of a sketch, ``r`` the rank.
All functions take leading batch dimensions, change no argument, and compute in float32 unless said otherwise, in
float64 for float64 arguments.

Where the rows of ``G`` lie on several processes, each passes its own rows and ``reduce``, which sums a tensor over the
processes. Only n x k and k x k tensors are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from galore_trainer.core.galore import MULTIPLIES_BF16, matmul_wide, widen

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that hold a matrix's rows; each gets the sum."""

Orthonormalize = Callable[[Tensor, Reduce | None], Tensor]
"""Orthonormal columns [..., rows, k] that span the columns of a matrix of this shape, rows >= k, float32; with a
``Reduce`` both are this process's rows."""

Eigenvectors = Callable[[Tensor], Tensor]
"""Eigenvectors of symmetric matrices [..., k, k] in float64: columns by falling eigenvalue, of any sign, in float32 or
float64."""

NEARLY = 1e-3  # of one: how far columns may be from orthonormal before the last Cholesky factor
LEAST_SHARE = 1e-12  # of the largest eigenvalue of a Gram matrix: directions below it are noise of float32


def factor(G: Tensor) -> Tensor:
    """A gradient as ``product`` multiplies it: in bfloat16 where it is and the device can, else widened."""
    return G if G.dtype == torch.bfloat16 and G.device.type in MULTIPLIES_BF16 else widen(G)


def product(G: Sequence[Tensor], X: Tensor) -> Tensor:
    """G X in the dtype of X, [blocks, m, k].

    Where the device multiplies bfloat16, a bfloat16 ``G`` stays what it is, and the 24 bits of ``X`` become three
    bfloat16 numbers beside each other: tensor cores, and nothing rounded away.

    Args:
        G: parts of one stack, each [its blocks, m, n] as ``factor`` gives them; they are not joined.
        X: [blocks, n, k], float32, or float64 where G is.
    """
    low = G[0].dtype == torch.bfloat16
    factors = (_three_parts(X) if low else X).split([len(part) for part in G])
    found = [matmul_wide(part, x) for part, x in zip(G, factors, strict=True)]
    joined = found[0] if len(found) == 1 else torch.cat(found)
    return joined.unflatten(-1, (3, -1)).sum(dim=-2) if low else joined


def _three_parts(X: Tensor) -> Tensor:
    high = X.bfloat16()
    rest = X - high
    middle = rest.bfloat16()
    return torch.cat([high, middle, (rest - middle).bfloat16()], dim=-1)


def by_householder(A: Tensor, reduce: Reduce | None = None) -> Tensor:
    """``Orthonormalize`` for every A; across processes, where QR would need all rows, by whitening."""
    return torch.linalg.qr(A, mode="reduced").Q if reduce is None else by_whitening(A, reduce)


def by_cholesky(A: Tensor, reduce: Reduce | None = None) -> Tensor:
    """``Orthonormalize`` for a GPU, where Householder's is slow; NaN where columns are too close to dependent for it.

    Two Cholesky factors in float64: the first leaves an error of about 2^-53 times the square of the condition number,
    the second none where the first left less than ``NEARLY`` (Yamamoto et al. 2015, "Roundoff error analysis of the
    CholeskyQR2 algorithm").
    """
    Q = A.double()
    identity = torch.eye(A.shape[-1], dtype=Q.dtype, device=Q.device)
    for _ in range(2):
        gram = Q.mT @ Q if reduce is None else reduce(Q.mT @ Q)
        L = torch.linalg.cholesky_ex(gram).L
        Q = Q @ torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False).mT
    error = torch.linalg.matrix_norm(gram - identity, keepdim=True)
    return torch.where(error < NEARLY, Q, torch.nan).to(A.dtype)


def by_whitening(A: Tensor, reduce: Reduce) -> Tensor:
    """Orthonormal columns where each process has some rows, by eigenvectors of the Gram matrix.

    In float64 and twice, as once leaves the square of the condition number as an error. A direction that ``A`` does not
    span is a column of zeros.
    """
    for _ in range(2):
        wide = A.double()
        values, vectors = torch.linalg.eigh(reduce(wide.mT @ wide))  # [..., k], [..., k, k]
        kept = values > LEAST_SHARE * values[..., -1:].clamp(min=torch.finfo(torch.float32).tiny)
        scale = torch.where(kept, values.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
        A = (wide @ (vectors * scale.unsqueeze(-2))).to(A.dtype)
    return A


def by_eigh(C: Tensor) -> Tensor:
    """``Eigenvectors`` by the library, one matrix after the other."""
    return torch.linalg.eigh(C).eigenvectors.flip(-1)  # it sorts them rising


class Tools(NamedTuple):
    """How small factorizations are made: for certain, or fast and perhaps NaN."""

    orthonormalize: Orthonormalize = by_householder
    eigenvectors: Eigenvectors = by_eigh


CERTAIN = Tools()


def thin_singular_vectors(B: Tensor, rank: int, tools: Tools = CERTAIN) -> tuple[Tensor, Tensor]:
    """The first ``rank`` left and right singular vectors of a wide matrix, through its k x k Gram matrix.

    The Gram matrix squares the condition number, so it is formed and decomposed in float64. Signs are arbitrary.

    Args:
        B: [..., k, n] with k <= n, float32 or float64.
        rank: at most k.
        tools: for the Gram matrix, and for columns that are orthogonal but for rounding.

    Returns:
        U [..., k, rank] and V [..., n, rank], in the dtype of B.
    """
    wide = B.double()
    U = tools.eigenvectors(wide @ wide.mT)[..., :rank].to(B.dtype)  # [..., k, rank]
    return U, tools.orthonormalize(B.mT @ U, None)  # orthogonal already but for rounding: scaled to length one


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


def subspace_iteration(
    G: Sequence[Tensor], Y: Tensor, iterations: int, tools: Tools = CERTAIN, reduce: Reduce | None = None
) -> Tensor:
    """An orthonormal basis of the dominant column space of ``G``.

    Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithm 4.4: each product is orthonormalised.

    Args:
        G: parts of [blocks, m, n], as ``product`` takes them.
        Y: samples of its columns [blocks, m, k], as a rule G times a Gaussian test matrix.
        iterations: power iterations q; 0 is the plain range finder.
        tools: make columns orthonormal.
        reduce: G and Y are this process's rows; None where they are all.

    Returns:
        Q [blocks, m, k], of the rows that were passed.
    """
    across = [part.mT for part in G]
    Q = tools.orthonormalize(Y, reduce)  # [..., m, k]
    for _ in range(iterations):
        Z = product(across, Q)
        Z = tools.orthonormalize(Z if reduce is None else reduce(Z), None)  # [..., n, k]
        Q = tools.orthonormalize(product(G, Z), reduce)  # [..., m, k]
    return Q
