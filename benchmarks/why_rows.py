"""Rows of the tables that ``why.py`` writes, from gradients X and bases P by kind of module (``why_measures.py``)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import why_measures as measures
from torch import Tensor

Gradients = dict[str, Tensor]
"""[L, rows, n] of every kind of module, transposed where the left side is projected."""
Row = dict[str, Any]

RANKS = (8, 32, 128)
LARGE = 0.012
"""Share of the entries of D that a sparse residual would take."""
SHARED = ("q_proj", "k_proj", "v_proj")
KINDS = (*SHARED, "o_proj", "gate_proj", "up_proj", "down_proj")
LEFT = ("down_proj",)
"""Kinds that are projected on the left side."""
PAIRS = (("q_proj", "k_proj"), ("q_proj", "v_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules with the same inputs, whose subspaces can be compared."""


def bases_of(X: Gradients, rank: int) -> Gradients:
    """The best bases of a rank."""
    return {kind: measures.top(of_kind, rank) for kind, of_kind in X.items()}


def ranks_of(P: Gradients) -> list[int]:
    """The ranks that the bases have columns for."""
    return [rank for rank in RANKS if rank <= min(of_kind.shape[-1] for of_kind in P.values())]


def compared(old: Gradients, P: Gradients, X: Gradients, **where: int) -> Iterator[Row]:
    """Similarity of two bases, and how much of X, from which P is, each keeps."""
    for kind in KINDS:
        for rank in ranks_of(P):
            before, now = old[kind][..., :rank], P[kind][..., :rank]
            yield {
                **where,
                "kind": kind,
                "rank": rank,
                "similarity": mean(measures.similarity(before, now)),
                "chance": short(rank / before.shape[-2]),
                "kept": mean(measures.kept(X[kind], before)),
                "kept_by_own": mean(measures.kept(X[kind], now)),
            }


def head_rows(kind: str, heads: Tensor, other_batch: Tensor, ranks: Sequence[int], layers: Sequence[int]) -> list[Row]:
    """How similar the subspaces of heads are, and what one head's basis keeps of another, a row a rank and layer.

    Args:
        kind: of module.
        heads, other_batch: gradients of two batches, [L, heads, d, n].
        ranks: those up to d are looked at.
        layers: their numbers.
    """
    rows: list[Row] = []
    joint = measures.top(heads.flatten(1, 2), max(ranks))
    for rank in (r for r in ranks if r <= heads.shape[2]):
        bases, others = measures.top(heads, rank), measures.top(other_batch, rank)
        pairs, _ = measures.head_pairs(bases, bases)
        pairs_apart, itself = measures.head_pairs(bases, others)
        by_other, by_own = measures.kept_by_heads(heads, bases)
        columns = {
            "similarity": pairs,
            "other_batch": pairs_apart,
            "same_head_other_batch": itself,
            "kept_by_other": by_other,
            "kept_by_own": by_own,
            "kept_by_joint": measures.kept(heads, joint[:, None, :, :rank]).mean(dim=1),
        }
        chance = short(rank / heads.shape[-1])
        rows += by_layer({"kind": kind, "rank": rank, "chance": chance}, columns, layers)
    return rows


def module_rows(P: Gradients) -> Iterator[Row]:
    """Similarity of the joint subspaces of modules that have the same inputs."""
    for one, other in PAIRS:
        for rank in ranks_of(P):
            value = mean(measures.similarity(P[one][..., :rank], P[other][..., :rank]))
            yield {"kinds": [one, other], "rank": rank, "similarity": value, "chance": short(rank / P[one].shape[1])}


def lost_rows(
    kind: str, X: Tensor, P: Tensor, heads: Tensor | None, held: Sequence[Tensor], layers: Sequence[int]
) -> list[Row]:
    """What a projection loses of its own batch and of another one, and how concentrated that is; a row a layer.

    Args:
        kind: of module.
        X, P: gradients, and their bases of the largest rank.
        heads: X by head, where a head may lend its basis.
        held: gradients of other batches.
        layers: their numbers.
    """
    participation, stable = measures.effective_ranks(X, P)
    columns = {"participation_ratio": participation, "stable_rank": stable}
    for rank in ranks_of({kind: P}):
        basis = P[..., :rank]
        columns[f"joint_{rank}"] = 1.0 - measures.kept(X, basis)
        columns[f"joint_{rank}_other_batch"] = 1.0 - measures.kept(held[0], basis)
        columns[f"large_{rank}"] = measures.concentration(lose(held[0], basis), LARGE)
        if heads is not None:
            lent = measures.lent_bases(heads, rank)
            for name, Y in (("", X), ("_other_batch", held[0])):
                shares = torch.stack([measures.kept(Y, of_heads) for of_heads in lent])
                columns[f"shared_{rank}{name}"] = 1.0 - shares.mean(dim=0)
    return by_layer({"kind": kind}, columns, layers)


def signal_rows(kind: str, P: Tensor, heads: Tensor | None, held: Sequence[Tensor]) -> Iterator[Row]:
    """What held-out batches have in common, inside the bases and outside them; arguments as for ``lost_rows``."""
    for rank in ranks_of({kind: P}):
        bases = {"joint": P[..., :rank]}
        if heads is not None:
            bases["shared"] = measures.lent_bases(heads, rank)[0]
        for basis, columns in bases.items():
            found = measures.persistent(held, columns)
            one, other, *more = (lose(some, columns) for some in held)
            chosen_by = torch.stack(more).mean(dim=0)  # as a warm-up chooses the entries of a sparse residual
            found["large_energy"] = measures.at_largest(chosen_by, one, one, LARGE)
            found["large_signal"] = measures.at_largest(chosen_by, one, other, LARGE)
            yield {"kind": kind, "rank": rank, "basis": basis} | {name: short(v) for name, v in found.items()}


def source_rows(one: Gradients, of_mean: Gradients, X: Gradients, held: Sequence[Gradients]) -> Iterator[Row]:
    """What bases keep of batches that they do not know, by how many batches they come from.

    Args:
        one: bases of the first held-out batch.
        of_mean: bases of the mean gradient of all held-out batches but the last.
        X, held: gradients of the step's batch and of held-out ones.

    Yields:
        ``kept``: share of the energy of X; ``signal``: share of the inner product of X and the last held-out gradient.
    """
    for kind in KINDS:
        new, last = X[kind], held[-1][kind]
        stacked = torch.cat([some[kind] for some in held[:-1]], dim=1)
        bases = {"one": one[kind], "mean": of_mean[kind], "stacked": measures.top(stacked, one[kind].shape[-1])}
        for rank in ranks_of(one):
            for source, columns in bases.items():
                yield {"kind": kind, "rank": rank, "source": source, **kept_of(new, last, columns[..., :rank])}


def side_rows(P: Gradients, X: Gradients, held: Sequence[Gradients]) -> Iterator[Row]:
    """What bases of either side keep of held-out batches; arguments as for ``source_rows``, P the bases of X."""
    for kind in KINDS:
        for side in ("left", "right"):
            as_trained = (side == "left") == (kind in LEFT)
            new, last = (Y[kind] if as_trained else Y[kind].mT for Y in (held[0], held[-1]))
            columns = P[kind] if as_trained else measures.top(X[kind].mT, P[kind].shape[-1])
            for rank in ranks_of(P):
                yield {"kind": kind, "rank": rank, "side": side, **kept_of(new, last, columns[..., :rank])}


def kept_of(new: Tensor, last: Tensor, P: Tensor) -> Row:
    """The share of the energy of one gradient that P keeps, and of its inner product with another, all layers' sum."""
    common = ((new @ P) * (last @ P)).sum() / (new * last).sum()
    return {"kept": mean(measures.kept(new, P)), "signal": short(common)}


def update_row(kind: str, optimizer: Any, weights: Sequence[Tensor], residual_scale: float) -> Row:
    """||phi D|| / ||lift(N)|| of the optimizer's own bases, as ``wanted`` and ``done``: before and after the limit.

    ``lost`` is the share of the gradient's energy outside these bases. To be called after the step.
    """
    parts = zip(*(_parts(optimizer, w, residual_scale) for w in weights), strict=True)
    means = zip(("wanted", "done", "lost"), map(statistics.fmean, parts), strict=True)
    return {"kind": kind, **{name: short(value) for name, value in means}}


def _parts(optimizer: Any, w: Tensor, residual_scale: float) -> tuple[float, float, float]:
    from galore_trainer.core import galore, scaled
    from galore_trainer.optim.bucket import BASIS
    from galore_trainer.optim.residual import NORM

    group, state, G = optimizer.param_groups[0], optimizer.state[w], w.grad.float()[None]
    M, V, P = state["exp_avg"], state["exp_avg_sq"], state[BASIS].float()
    side = "right" if M.shape[-2] == G.shape[-2] else "left"
    R, ok = galore.project(G, P, side), torch.ones(1, 1, 1, device=G.device)
    first, second = (galore.decay_sum(beta, state["step"].to(M.dtype)) for beta in group["betas"])
    N = (M / first) / ((V / second).sqrt() + group["eps"])
    squares = scaled.squared_norms(G, side, R.dtype)
    _, d = scaled.line_factors(squares, R, N, ok, side, residual_scale=residual_scale, noise=0.0)
    size = torch.linalg.vector_norm(N)
    lost = 1.0 - measures.energy(R).sum() / measures.energy(G).sum()
    return float(d.sum().sqrt() / size), float(state[NORM] / size), float(lost)


def lose(X: Tensor, P: Tensor) -> Tensor:
    """What the projection loses, D."""
    return X - (X @ P) @ P.mT


def by_layer(row: Row, columns: dict[str, Tensor], layers: Sequence[int]) -> list[Row]:
    """A row for each layer, from columns [L]."""
    return [
        {**row, "layer": layer, **{name: short(values[i]) for name, values in columns.items()}}
        for i, layer in enumerate(layers)
    ]


def short(value: Any) -> float:
    """A number as it is written down."""
    return round(float(value), 4)


def mean(values: Tensor) -> float:
    """The mean over layers, as it is written down."""
    return short(values.mean())
