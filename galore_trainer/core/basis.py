"""Basis functions ``f(G, rank, side, ...) -> P``, registered under the values of the option ``svd``.

P has orthonormal columns. On the right side it is [blocks, n, r] and approximates the leading right singular vectors of
G [blocks, m, n]; on the left side it is [blocks, m, r] and approximates the leading left ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_trainer.core.galore import compute_dtype, widen
from galore_trainer.core.linalg import (
    CERTAIN,
    Eigenvectors,
    Reduce,
    Tools,
    factor,
    gram_of_rows,
    product,
    right_vectors,
    subspace_iteration,
    thin_singular_vectors,
)

BasisFunction = Callable[..., "Tensor | Begun"]
BASES: dict[str, BasisFunction] = {}
REDUCES: set[str] = set()
"""Bases that take ``reduce``: they are found from the rows of each process, which stay where they are."""
EXACT: set[str] = set()
"""Bases that join and widen the whole gradient, and take no test matrix."""


class Begun(NamedTuple):
    """A basis of which eigenvectors are missing.

    A GPU finds those of many matrices in the time of one, so that bases of unequal matrices begin one after the other,
    and are finished together.

    Attributes:
        gram: matrices [blocks, k, k], float64.
        eigenvectors: finds theirs.
        finish: takes them; the basis.
    """

    gram: Tensor
    eigenvectors: Eigenvectors
    finish: Callable[[Tensor], Tensor]


def finish_together(begun: list[Begun | Tensor]) -> Iterator[Tensor]:
    """The bases, in order: eigenvectors of matrices of one size, dtype and device are found by one call.

    Args:
        begun: by functions of ``BASES``; the list is emptied, so that each is freed once it is finished.
    """
    alike: dict[tuple[Eigenvectors, int, torch.dtype, torch.device], dict[int, Tensor]] = {}
    for i, some in enumerate(begun):
        if isinstance(some, Begun):
            key = (some.eigenvectors, some.gram.shape[-1], some.gram.dtype, some.gram.device)
            alike.setdefault(key, {})[i] = some.gram
    vectors: dict[int, Tensor] = {}
    for (eigenvectors, *_), grams in alike.items():
        found = eigenvectors(torch.cat(list(grams.values()))).split([len(gram) for gram in grams.values()])
        vectors.update(zip(grams, found, strict=True))
    for i in range(len(begun)):
        some = begun.pop(0)
        yield some.finish(vectors.pop(i)) if isinstance(some, Begun) else some


def register(name: str, *, reduces: bool = False, exact: bool = False) -> Callable[[BasisFunction], BasisFunction]:
    """Decorator that adds a basis function to ``BASES``.

    The keyword arguments of a basis function are those of ``begin_randomized``; it may ignore what it does not need. It
    returns a basis, or ``Begun``. The basis is NaN where it fails, or it is ``exact``, whose errors are allowed for.

    Args:
        name: the value of ``svd``.
        reduces: the function takes ``reduce``. Without it the rows of cut weights are gathered.
        exact: the function joins whole gradients in float32 and needs no ``omega``.
    """

    def add(function: BasisFunction) -> BasisFunction:
        BASES[name] = function
        REDUCES.update({name} if reduces else ())
        EXACT.update({name} if exact else ())
        return function

    return add


def sketch_width(rank: int, oversampling: int, m: int, n: int) -> int:
    """Columns k of the test matrix: rank plus oversampling, at most min(m, n)."""
    return min(rank + oversampling, m, n)


def decomposes(svd: str, width: int, m: int, n: int, raw_signs: bool) -> bool:
    """Whether the basis comes from ``torch.linalg.svd`` of the whole matrix, which raises for non-finite entries.

    Args:
        svd: the name of a basis function.
        width: ``sketch_width``. At min(m, n) ``randomized`` uses the exact path.
        m, n: shape of the matrix that is decomposed.
        raw_signs: as for ``exact``.
    """
    return (svd in EXACT or width >= min(m, n)) and not _by_gram(m, n, raw_signs)


def _by_gram(m: int, n: int, raw_signs: bool) -> bool:
    """Whether the Gram matrix of the shorter side gives the basis: faster, with signs that differ from the SVD's."""
    return not raw_signs and 2 * min(m, n) <= max(m, n)


@register("exact", exact=True)
def exact(
    G: Sequence[Tensor],
    rank: int,
    side: str,
    *,
    omega: Tensor | None = None,
    previous: Tensor | None = None,
    iterations: int = 0,
    raw_signs: bool = False,
    tools: Tools = CERTAIN,
) -> Tensor:
    """The leading singular vectors of the blocks of ``G``.

    Args:
        G: tensors that together are [blocks, m, n], in one dtype: float32, bfloat16 or float64.
        rank: r, at most min(m, n).
        side: ``right`` or ``left``.
        omega, previous, iterations: unused; see ``register``.
        raw_signs: keep the signs of ``torch.linalg.svd``, as GaLore does. Otherwise a matrix with one side at most half
            the other is decomposed through its smaller Gram matrix.
        tools: routines for the Gram matrix.

    Returns:
        P [blocks, n, r] (right) or [blocks, m, r] (left), in ``compute_dtype``.

    Raises:
        torch.linalg.LinAlgError: an entry is not finite, and no Gram matrix is used.
    """
    stacked = widen(G[0] if len(G) == 1 else torch.cat(list(G)))
    m, n = stacked.shape[-2:]
    if _by_gram(m, n, raw_signs):
        thin, wide = thin_singular_vectors(stacked if m <= n else stacked.mT, rank, tools)
        return wide if (side == "right") == (m <= n) else thin
    U, _, Vh = torch.linalg.svd(stacked, full_matrices=False)
    return Vh[..., :rank, :].mT.contiguous() if side == "right" else U[..., :rank].contiguous()


@register("randomized", reduces=True)
def begin_randomized(
    G: Sequence[Tensor],
    rank: int,
    side: str,
    *,
    omega: Tensor,
    previous: Tensor | None = None,
    iterations: int = 2,
    raw_signs: bool = False,
    tools: Tools = CERTAIN,
    reduce: Reduce | None = None,
) -> Begun | Tensor:
    """Randomized subspace iteration (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1).

    Args:
        G: tensors that together are [blocks, m, n], in one dtype: float32, bfloat16 or float64.
        rank: r, at most k.
        side: ``right`` or ``left``.
        omega: Gaussian test matrix [blocks, n, k]. At k = min(m, n) a sketch saves nothing, and ``exact`` is used.
        previous: the last basis, for a warm start. It replaces the first r columns of Omega (right) or of G Omega
            (left).
        iterations: power iterations q.
        raw_signs: for ``exact``.
        tools: routines for small factorizations. P is NaN where they fail.
        reduce: sums over processes, where G holds only this process's rows. Requires the right side and k < min(m, n).

    Returns:
        What lacks the eigenvectors of the Gram matrix of Q^T G; a basis where ``exact`` is used.
    """
    if reduce is not None:
        assert side == "right"
    elif omega.shape[-1] >= min(G[0].shape[-2:]):
        return exact(G, rank, side, raw_signs=raw_signs, tools=tools)
    omega = omega.to(compute_dtype(G[0].dtype))
    if previous is not None and side == "right":
        omega = torch.cat([previous, omega[..., rank:]], dim=-1)
    G = [factor(part) for part in G]
    Y = product(G, omega)  # [blocks, m, k]
    if previous is not None and side == "left":
        Y = torch.cat([previous, Y[..., rank:]], dim=-1)
    Q = subspace_iteration(G, Y, iterations, tools, reduce)  # [blocks, m, k]
    B = product([part.mT for part in G], Q).mT.contiguous()  # Q^T G, [blocks, k, n]
    B = B if reduce is None else reduce(B)
    gram = gram_of_rows(B)
    if side == "left":
        return Begun(gram, tools.eigenvectors, functools.partial(_left_basis, Q, rank))
    return Begun(gram, tools.eigenvectors, functools.partial(_right_basis, B, rank, tools))


def _left_basis(Q: Tensor, rank: int, vectors: Tensor) -> Tensor:
    return Q @ vectors[..., :rank].to(Q.dtype)


def _right_basis(B: Tensor, rank: int, tools: Tools, vectors: Tensor) -> Tensor:
    return right_vectors(B, vectors[..., :rank].to(B.dtype), tools)


def randomized(G: Sequence[Tensor], rank: int, side: str, **options: Any) -> Tensor:
    """``begin_randomized``, and its end: P as from ``exact``."""
    return next(finish_together([begin_randomized(G, rank, side, **options)]))


def from_sketch(S: Tensor, rank: int, side: str, tools: Tools = CERTAIN) -> Tensor:
    """A basis from a single-pass sketch of the gradient (q = 0; Halko, Martinsson, Tropp 2011, section 5.5).

    Args:
        S: T^T G [blocks, k, n] (right) or G T [blocks, m, k] (left) for a Gaussian T, float32.
        rank: r, at most k.
        side: ``right`` or ``left``.
        tools: routines for small factorizations.

    Returns:
        P, the leading singular vectors of S on the side that the sketch did not compress; shape as from ``exact``.
    """
    return thin_singular_vectors(S if side == "right" else S.mT, rank, tools)[1]
