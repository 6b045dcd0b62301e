"""Measures of gradients' subspaces and of what a projection loses, for ``why.py``.

Legend (L: layers, measured together):
    X  gradients [L, rows, n]: G where the right side is projected, G transposed where the left one is
    P  bases [L, n, r], orthonormal columns, the leading directions first

Means are over layers. Energies are squared Frobenius norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from galore_trainer.core.linalg import thin_singular_vectors


def top(X: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors, [..., n, rank], exact: from the Gram matrix in float64."""
    if X.shape[-2] < X.shape[-1]:
        return thin_singular_vectors(X, rank)[1]
    return thin_singular_vectors(X.mT, rank)[0]


def similarity(P: Tensor, Q: Tensor) -> Tensor:
    """Mean squared cosine of the principal angles, ||P^T Q||^2 / r: 1 for equal subspaces, r / n for random ones."""
    return energy(P.mT @ Q) / P.shape[-1]


def energy(X: Tensor) -> Tensor:
    """Squared norms of the matrices."""
    return X.square().sum(dim=(-2, -1))


def kept(X: Tensor, P: Tensor) -> Tensor:
    """The share of the energy of X that P keeps."""
    return energy(X @ P) / energy(X)


def effective_ranks(X: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """Participation ratio (sum s^2)^2 / sum s^4 and stable rank sum s^2 / max s^2 of the singular values s of X.

    Args:
        X: gradients.
        P: their own best bases.
    """
    gram = X @ X.mT if X.shape[-2] < X.shape[-1] else X.mT @ X
    return energy(X).square() / energy(gram), energy(X) / energy(X @ P[..., :1])


# ---------------------------------------------------------------------- heads


def head_pairs(bases: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity of heads' subspaces: of different heads, and of a head with itself, in two sets of gradients.

    Args:
        bases, others: [L, heads, n, r]; the same tensor for one set of gradients.

    Returns:
        [L] each.
    """
    values = similarity(bases.unsqueeze(2), others.unsqueeze(1))  # [L, heads, heads]
    return off_diagonal(values), values.diagonal(dim1=-2, dim2=-1).mean(dim=-1)


def kept_by_heads(heads: Tensor, bases: Tensor) -> tuple[Tensor, Tensor]:
    """The share of a head's energy that another head's basis keeps, and that its own keeps, [L] each.

    Args:
        heads: gradients [L, heads, d, n].
        bases: [L, heads, n, r].
    """
    values = kept(heads.unsqueeze(2), bases.unsqueeze(1))  # [L, heads, heads]: energy of the first in the second
    return off_diagonal(values), values.diagonal(dim1=-2, dim2=-1).mean(dim=-1)


def lent_bases(heads: Tensor, rank: int) -> Tensor:
    """The bases that one head could lend, or the fewest that can span the rank, [lenders, L, n, rank].

    Args:
        heads: gradients [L, heads, d, n].
        rank: of the bases.
    """
    count, d = heads.shape[1:3]
    width = math.ceil(rank / d)
    lent = (torch.cat([heads[:, (i + k) % count] for k in range(width)], dim=1) for i in range(count))
    return torch.stack([top(some, rank) for some in lent])


def off_diagonal(values: Tensor) -> Tensor:
    """Mean over pairs of different heads, [L]; NaN for a single head."""
    count = values.shape[-1]
    total = values.sum(dim=(-2, -1)) - values.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return total / (count * (count - 1)) if count > 1 else torch.full_like(total, torch.nan)


# ---------------------------------------------------------------------- signal and noise


def persistent(batches: Sequence[Tensor], P: Tensor) -> dict[str, float]:
    """How much of the gradient is the same in every batch, inside P and outside it.

    The gradient of a batch is a signal S, the same for all batches, and noise that is independent between them. The
    inner product of two batches' gradients is ||S||^2 on average, so that it needs no estimate of S.

    Args:
        batches: gradients X of independent batches at the same weights; P has to come from another one.
        P: the bases.

    Returns:
        ``inside``: share of a gradient's energy in P; ``signal``: share that is signal; ``signal_inside``: share of
        the signal in P; ``cosine_inside``, ``cosine_outside``: between two batches' gradients in P, and outside it;
        ``mean_inside``, ``mean_outside``: between one batch's and the mean of all others'.
    """
    whole = _products(batches)  # [L, batches, batches]
    inside = _products([X @ P for X in batches])
    outside = whole - inside
    (signal, total), (signal_in, total_in) = _signal(whole), _signal(inside)
    signal_out, total_out = _signal(outside)
    return {
        "inside": float((total_in / total).mean()),
        "signal": float((signal / total).mean()),
        "signal_inside": float(signal_in.sum() / signal.sum()),
        "cosine_inside": float((signal_in / total_in).mean()),
        "cosine_outside": float((signal_out / total_out).mean()),
        "mean_inside": float(_with_mean_of_others(inside).mean()),
        "mean_outside": float(_with_mean_of_others(outside).mean()),
    }


def _products(batches: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack([X.flatten(1) for X in batches], dim=1)  # [L, batches, entries]
    return (stacked @ stacked.mT).double()


def _signal(products: Tensor) -> tuple[Tensor, Tensor]:
    """Mean inner product of different batches, and mean energy of one, [L] each."""
    return off_diagonal(products), products.diagonal(dim1=-2, dim2=-1).mean(dim=-1)


def _with_mean_of_others(products: Tensor) -> Tensor:
    """Cosine between a batch's gradient and the mean of all others', [L, batches]."""
    own = products.diagonal(dim1=-2, dim2=-1)
    with_others = products.sum(dim=-1) - own
    of_others = products.sum(dim=(-2, -1)).unsqueeze(-1) - 2 * products.sum(dim=-1) + own
    return with_others / (own * of_others).sqrt()


# ---------------------------------------------------------------------- concentration


def concentration(D: Tensor, share: float) -> Tensor:
    """The share of the energy of D in its largest entries, [L]; ``share`` of the entries count as large."""
    squares = D.square().flatten(1)
    return squares.topk(round(share * squares.shape[1]), dim=1).values.sum(dim=1) / squares.sum(dim=1)


def gaussian_concentration(share: float) -> float:
    """``concentration`` of a large matrix of independent Gaussian entries."""
    normal = torch.distributions.Normal(0.0, 1.0)
    z = normal.icdf(torch.tensor(1.0 - share / 2, dtype=torch.float64))
    return share + 2 * float(z * normal.log_prob(z).exp())


def at_largest(chosen_by: Tensor, A: Tensor, B: Tensor, share: float) -> Tensor:
    """The share of the inner product of A and B that lies at the largest entries of another matrix, one number.

    Args:
        chosen_by, A, B: [L, rows, n]; the entries are chosen in each layer, the products summed over layers.
        share: of the entries.
    """
    products, choice = (A * B).flatten(1), chosen_by.abs().flatten(1)
    places = choice.topk(round(share * choice.shape[1]), dim=1).indices
    return products.gather(1, places).sum() / products.sum()
