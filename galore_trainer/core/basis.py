"""Where a projection comes from: a registry of functions ``f(G, rank, side, ...) -> P`` with orthonormal columns.

The right basis is [..., n, r] (top right singular vectors of ``G``), the left one [..., m, r] (top left ones).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from galore_trainer.core.galore import compute_dtype, widen
from galore_trainer.core.linalg import (
    CERTAIN,
    Reduce,
    Tools,
    factor,
    product,
    subspace_iteration,
    thin_singular_vectors,
)

BasisFunction = Callable[..., Tensor]
BASES: dict[str, BasisFunction] = {}


def register(name: str) -> Callable[[BasisFunction], BasisFunction]:
    """Make a function available as a value of ``svd``."""

    def add(function: BasisFunction) -> BasisFunction:
        BASES[name] = function
        return function

    return add


def sketch_width(rank: int, oversampling: int, m: int, n: int) -> int:
    """Columns k of the test matrix: rank plus oversampling, never more than the smaller side."""
    return min(rank + oversampling, m, n)


def decomposes(svd: str, width: int, m: int, n: int, raw_signs: bool) -> bool:
    """Whether the library's SVD of a whole m x n matrix is taken, which raises an error where an entry is not finite.

    Args:
        svd: the name of a basis function.
        width: ``sketch_width``, which says whether ``randomized`` takes the exact path.
        m, n: of the rows that give the basis.
        raw_signs: as ``exact`` takes it.
    """
    return (svd == "exact" or width >= min(m, n)) and not _by_gram(m, n, raw_signs)


def _by_gram(m: int, n: int, raw_signs: bool) -> bool:
    return not raw_signs and 2 * min(m, n) <= max(m, n)


@register("exact")
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
        G: parts of [blocks, m, n] in one dtype: float32, bfloat16 or float64.
        rank: r, at most min(m, n).
        side: ``right`` or ``left``.
        omega: not used; every basis function takes the same arguments.
        previous: not used.
        iterations: not used.
        raw_signs: keep the signs of ``torch.linalg.svd``, as GaLore does. Where signs do not matter, a matrix with
            one side at most half the other goes through its small Gram matrix, which is faster.
        tools: for that matrix.

    Returns:
        P [..., n, r] for the right side, [..., m, r] for the left.
    """
    whole = widen(G[0] if len(G) == 1 else torch.cat(list(G)))
    m, n = whole.shape[-2:]
    if _by_gram(m, n, raw_signs):
        thin, wide = thin_singular_vectors(whole if m <= n else whole.mT, rank, tools)
        return wide if (side == "right") == (m <= n) else thin
    U, _, Vh = torch.linalg.svd(whole, full_matrices=False)
    return Vh[..., :rank, :].mT.contiguous() if side == "right" else U[..., :rank].contiguous()


@register("randomized")
def randomized(
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
) -> Tensor:
    """Randomized subspace iteration (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1).

    Args:
        G: parts of [blocks, m, n] in one dtype: float32, bfloat16 or float64.
        rank: r, at most k.
        side: ``right`` or ``left``.
        omega: Gaussian test matrix [..., n, k]; k = min(m, n) takes the exact path, since nothing would be saved.
        previous: the basis before, for a warm start: it takes the place of the first r columns of Omega (right) or of
            the first r directions of the range (left).
        iterations: power iterations q.
        raw_signs: passed on to the exact path.
        tools: for small factorizations; P is NaN where they fail.
        reduce: G holds this process's rows alone, and this sums over the processes; right side, k below min(m, n).

    Returns:
        P as ``exact`` does.
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
    U, V = thin_singular_vectors(B if reduce is None else reduce(B), rank, tools)
    return V if side == "right" else Q @ U


def from_sketch(S: Tensor, rank: int, side: str, tools: Tools = CERTAIN) -> Tensor:
    """A basis from one random sketch of the gradient (no second look at it, so q = 0).

    Halko, Martinsson, Tropp 2011, section 5.5: the sketch's leading singular vectors on the side that was kept whole.

    Args:
        S: T^T G [..., k, n] (right) or G T [..., m, k] (left) for a Gaussian T, float32.
        rank: r, at most k.
        side: ``right`` or ``left``.
        tools: for small factorizations.

    Returns:
        P as ``exact`` does.
    """
    return thin_singular_vectors(S if side == "right" else S.mT, rank, tools)[1]
