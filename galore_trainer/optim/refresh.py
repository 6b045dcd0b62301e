"""New bases: when they are due, how they are found, and what becomes of the moments.

One path serves whole weights and weights of which this process holds some rows. Bases are the same on every process:
they come from sums over the processes of n x k and k x k products (``reduce``, None for whole weights), or from rows
that ``lenders.py`` gathers. Moments are carried over piece by piece.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core import galore
from galore_trainer.core.basis import BASES, EXACT, Begun, decomposes, finish_together, from_sketch
from galore_trainer.core.galore import compute_dtype
from galore_trainer.core.linalg import CERTAIN, Reduce, Tools, by_cholesky, by_eigh, by_householder
from galore_trainer.core.streams import stream
from galore_trainer.kernels import obstacle
from galore_trainer.optim.bucket import (
    MOMENTS,
    REFRESH_ELEMENTS,
    STACK_ELEMENTS,
    Bucket,
    bucket_elements,
    entries,
    runs,
)
from galore_trainer.optim.guards import Later, Retries
from galore_trainer.optim.kept import sketch, sketch_matrices, width_of_sketch
from galore_trainer.optim.layerwise import is_usable, norms_of
from galore_trainer.optim.lenders import lending_rows, stays
from galore_trainer.optim.local import AGE, RESIDUAL_AGE, LocalWeight, Piece
from galore_trainer.optim.ops_triton import wanted
from galore_trainer.optim.param_groups import gap_of, next_due
from galore_trainer.optim.residual import reset_residual

WAITING = 64  # most Gram matrices that wait for eigenvectors: a GPU finds so many in the time of one
LIBRARY = 3_000_000  # below k^3 / this many k x k matrices, the library one by one is faster than the kernel


# ---------------------------------------------------------------------- which weights


def norms_later(weights: Sequence[LocalWeight]) -> Later:
    """Frobenius norms of gradients on their way to the host; NaN where they are known not to be usable."""
    device = weights[0].weight.device
    return Later(torch.stack([norm.to(device) for norm in _norms(weights)]))


def _norms(weights: Sequence[LocalWeight]) -> list[Tensor]:
    """As ``norms_later``, of gradients as they enter the step: a clipped norm of 0 or NaN lets a refresh wait."""
    unknown = iter(norms_of([w.grad for w in weights if w.energy is None]))
    norms = [next(unknown).double() if w.energy is None else _usable_norm(w) for w in weights]
    return [norm if w.clip is None else norm * w.clip for w, norm in zip(weights, norms, strict=True)]


def _usable_norm(w: LocalWeight) -> Tensor:
    assert w.ok is not None
    assert w.energy is not None
    return torch.where(w.ok > 0.0, w.energy.sqrt(), float("nan"))


def part_due(due: Sequence[LocalWeight], config: GaLoreConfig) -> tuple[list[LocalWeight], list[LocalWeight]]:
    """Weights whose refresh may fail and is checked one step later, and weights whose gradients are checked first."""
    async_due = [w for w in due if all(_can_check_later(piece, config) for piece in w.matrix_pieces())]
    chosen = {id(w) for w in async_due}
    return async_due, [w for w in due if id(w) not in chosen]


def part_by_norm(
    checked_due: Sequence[LocalWeight], norms: Sequence[float], config: GaLoreConfig
) -> tuple[list[LocalWeight], list[LocalWeight]]:
    """Weights that can be refreshed now, and weights that do not move in this step, as they have no basis.

    The two may overlap: a first basis from a sketch moves nothing in its own step. A weight with a basis and a gradient
    that is not usable is in neither; it keeps its basis.

    A refresh from zeros, or from entries that are not finite, stays due. A weight has no basis where a sketch is about
    to give it its first one, or where its first gradient is not finite.

    Args:
        checked_due: from ``part_due``.
        norms: of their gradients.
        config: of the optimizer.
    """
    fit, without_basis = [], []
    for w, norm in zip(checked_due, norms, strict=True):
        if 0.0 < norm < math.inf:
            fit.append(w)
        if not w.has_basis and (config.sketches_first or not norm < math.inf):  # NaN is not
            without_basis.append(w)
    return fit, without_basis


def usable_at_first(w: LocalWeight) -> Tensor:
    """The flag of a weight without a basis; an infinite norm counts as unusable."""
    if w.ok is not None and (w.clip is not None or not w.shard.is_whole):
        return w.ok
    return is_usable(w.grad) * torch.isfinite(norms_of([w.grad])[0])


def _can_check_later(piece: Piece, config: GaLoreConfig) -> bool:
    """Whether this refresh may be checked one step later: it is on its grid and not the first from a whole gradient.

    The residual begins at the first of these, with the gradient of that step. ``momentum_transfer: reset`` would start
    its moments anew twice; the library's SVDs raise an error at NaN; and where tools that never fail are as fast there
    is nothing to gain.
    """
    w, (_, m, n) = piece.owner, piece.matrix.lending_shape
    state, gap = w.state, gap_of(w.group)
    width = width_of_sketch(piece.matrix, config, m, n)
    on_grid = state["refreshes"] > config.sketches_first and gap > 1 and (state["calls"] - state["phase"]) % gap == 0
    raises = config.diagnose_refreshes > 0 or decomposes(config.svd, width, m, n, config.momentum_transfer == "keep")
    apt = w.shard.is_whole and not raises and config.momentum_transfer != "reset"
    return on_grid and apt and tools_for(config, w.weight.device, compute_dtype(w.weight.dtype)) != CERTAIN


# ---------------------------------------------------------------------- a refresh


def refresh_buckets(weights: Sequence[LocalWeight], config: GaLoreConfig, asked: int | None = None) -> Iterator[Bucket]:
    """The matrices of weights, equal ones together, on every process the same ones in the same order.

    Args:
        weights: that are due.
        config: of the optimizer.
        asked: entries that are treated together, in place of what suits the device.
    """
    by_key: dict[tuple[Any, ...], list[Piece]] = {}
    for w in weights:
        for piece in w.matrix_pieces():
            by_key.setdefault(piece.key(), []).append(piece)
    for members in by_key.values():
        first = members[0]
        copies = config.svd in EXACT or first.grad.dtype == torch.float16  # in float32, of whole gradients
        most = STACK_ELEMENTS if copies and first.owner.shard.is_whole else REFRESH_ELEMENTS
        most = bucket_elements(first.weight.device, asked, most)
        size = max(1, most // _entries_here(first, config))
        for start in range(0, len(members), size):
            yield Bucket(members[start : start + size])


def _entries_here(piece: Piece, config: GaLoreConfig) -> int:
    """What a matrix counts for in a bucket; of rows that stay on their processes this one's share counts."""
    matrix, w = piece.matrix, piece.owner
    if w.shard.is_whole:
        return entries(matrix)
    if stays(matrix, config):
        return max(1, matrix.rows * matrix.columns // w.ranks.count)
    return REFRESH_ELEMENTS // STACK_ELEMENTS * math.prod(matrix.lending_shape)  # gathered rows are copied


def refresh_groups(
    weights: Sequence[LocalWeight], config: GaLoreConfig, asked: int | None = None
) -> Iterator[list[Bucket]]:
    """``refresh_buckets``, as many of a device at a time as may wait for their eigenvectors."""
    buckets = refresh_buckets(weights, config, asked)
    for _, on_device in itertools.groupby(buckets, key=lambda bucket: bucket.device):
        yield from runs(on_device, lambda bucket: _waiting(bucket, config), WAITING)


def _waiting(bucket: Bucket, config: GaLoreConfig) -> int:
    """Gram matrices that wait, each with Q^T G or Q. Buckets whose gradients were copied wait for no others."""
    first = bucket.pieces[0]
    lies_in_place = first.owner.shard.is_whole or stays(bucket.matrix, config)
    if config.svd in EXACT or first.grad.dtype == torch.float16 or not lies_in_place:
        return WAITING
    return len(bucket.pieces) * bucket.matrix.blocks


def refresh_together(
    buckets: Sequence[Bucket], config: GaLoreConfig, seed: int, retries: Retries | None = None
) -> list[tuple[Bucket, Tensor]]:
    """Find bases from the gradients, store them, and carry the moments over.

    Args:
        buckets: matrices that are due; their gradients are finite and not all zero where there are no ``retries``.
        config, seed: of the optimizer.
        retries: takes what may have failed, and is not waited for; without it a failure is made good here.

    Returns:
        Buckets, and their bases as they are stored, [pieces x blocks, ...], without those whose first basis came from a
        sketch.
    """
    dense = []
    for bucket in buckets:
        if bucket.is_kept or (config.sketches_first and bucket.pieces[0].owner.state["refreshes"] == 0):
            first_basis(bucket, config, seed)
        else:
            dense.append(bucket)
    searches = [Search(bucket, config, seed) for bucket in dense]
    bases = finish_together([search.begin(search.tools) for search in searches])
    stored = []
    for bucket, search, P in zip(dense, searches, bases, strict=True):
        found = P if retries is not None else certain(P, search.find, search.tools, search.reduce)
        stored.append((bucket, _store(bucket, found, config, retries)))
    return stored


def _store(bucket: Bucket, P: Tensor, config: GaLoreConfig, retries: Retries | None) -> Tensor:
    """Store new bases and carry the moments over; where finding failed the old ones stay, and ``retries`` knows."""
    mode, old = config.momentum_transfer, bucket.get_basis()
    ok: Tensor | None = None
    if retries is not None:
        norms = torch.stack(_norms([piece.owner for piece in bucket.pieces]))
        finite = torch.isfinite(P).reshape(len(bucket.pieces), -1).all(dim=1)
        succeeded = finite & torch.isfinite(norms) & (norms > 0.0)
        ok = bucket.spread(succeeded)
        P = torch.where(ok, P, old)
        retries.add([piece.owner.state for piece in bucket.pieces], ~succeeded)
    if not bucket.pieces[0].owner.has_basis:
        return bucket.put_basis(P)
    if mode == "align":
        P = galore.with_signs_of(P, old)
    if mode in ("rotate", "reset"):
        for part, bases in _with_moments(bucket):
            _carry_over(part, old[bases], P[bases], mode, ok)
    return bucket.put_basis(P)  # in place, so ``old`` is gone


def _with_moments(bucket: Bucket) -> Iterator[tuple[Bucket, Any]]:
    """The buckets that hold the moments of the matrices in ``bucket``, each with its part of their joined bases."""
    if bucket.pieces[0].owner.shard.is_whole:
        yield bucket, slice(None)
        return
    for i, piece in enumerate(bucket.pieces):
        first = i * bucket.matrix.blocks
        for part in piece.owner.pieces_of_state(piece.matrix):
            bases = part.block_index
            here = slice(first + bases.start, first + bases.stop) if isinstance(bases, slice) else first + bases
            yield Bucket([part]), here


def _carry_over(bucket: Bucket, old: Tensor, P: Tensor, mode: str, ok: Tensor | None) -> None:
    """Rotate the moments from old bases to new ones, or start them anew; they stay where ``ok`` is False."""
    before = [bucket.get_moment(key, signed=signed) for key, signed in MOMENTS]
    if mode == "reset":
        after = [torch.zeros_like(x) for x in before]
        reset_residual(bucket)
    else:
        M, V = before
        after = list(galore.rotate(M, V, bucket.ages(), old, P, bucket.matrix.side, betas=bucket.group["betas"]))
    if ok is not None:
        after = [torch.where(ok, x, x_before) for x, x_before in zip(after, before, strict=True)]
    for (key, signed), value in zip(MOMENTS, after, strict=True):
        bucket.put_moment(key, value, signed=signed, purpose=".refresh", ok=None if ok is None else ok.float())


def count_refresh(w: LocalWeight, config: GaLoreConfig) -> None:
    """Note in the state of a weight that it has new bases, and when the next ones are due."""
    state = w.state
    if config.momentum_transfer == "reset" and w.has_basis:  # once all of its matrices have their new bases
        for key in (AGE, RESIDUAL_AGE):
            if key in state:
                state[key].zero_()
    if state["refreshes"] == config.sketches_first:  # the first one from a whole gradient
        state["born"] = state["calls"]
    state["refreshes"] += 1
    state["due"] = next_due(state["calls"], gap_of(w.group), state["phase"])


# ---------------------------------------------------------------------- how bases are found


class Search:
    """How the bases of a bucket are found; the state is read, not written.

    Args:
        bucket: matrices that are due.
        config, seed: of the optimizer.

    Attributes:
        tools: to try first.
        reduce: sums over the processes that hold rows; None where they are whole.
    """

    def __init__(self, bucket: Bucket, config: GaLoreConfig, seed: int) -> None:
        self._bucket, self._config, self._seed = bucket, config, seed
        self._rows, self.reduce = lending_rows(bucket, config, seed)
        self.tools = tools_for(config, bucket.device, bucket.dtype)

    def find(self, tools: Tools) -> Tensor:
        """The bases."""
        return next(finish_together([self.begin(tools)]))

    def begin(self, tools: Tools) -> Begun | Tensor:
        """The bases, to be finished together with others."""
        bucket, config, omega, previous = self._bucket, self._config, None, None
        if config.svd not in EXACT:
            omega = draw_omega(bucket, config, self._seed)  # drawn again where it is needed again, and not held
            if config.warm_start and bucket.pieces[0].owner.has_basis:
                previous = bucket.get_basis()
        return BASES[config.svd](
            self._rows,
            bucket.matrix.rank,
            bucket.matrix.side,
            omega=omega,
            previous=previous,
            iterations=config.subspace_iterations,
            raw_signs=config.momentum_transfer == "keep",
            tools=tools,
            **({} if self.reduce is None else {"reduce": self.reduce}),
        )


def certain(P: Tensor, find: Callable[..., Tensor], tools: Tools, reduce: Reduce | None = None) -> Tensor:
    """Bases that were found with tools that may fail; if they did, with those that do not. May wait for the device.

    With ``reduce`` the processes do so together: a failure of one is one of all.
    """
    if tools == CERTAIN:
        return P
    failed = (~torch.isfinite(P)).any().float()
    return find(tools=CERTAIN) if bool(failed if reduce is None else reduce(failed)) else P


def first_basis(bucket: Bucket, config: GaLoreConfig, seed: int) -> None:
    """Give matrices their first basis from a sketch of their gradients: of whole ones, or the one that was kept.

    A sketch uses all rows of a block, even where one head will lend; its random matrices are the same for each
    micro-batch.
    """
    side = bucket.matrix.side
    if bucket.is_kept:
        S = bucket.kept(lambda grad: grad.sketch)
    else:
        parts = zip(bucket.pieces, bucket.gradients(), strict=True)
        S = torch.cat(
            [sketch(G, sketch_matrices(p.matrix, config, seed, p.name, bucket.device), side) for p, G in parts]
        )
    find = functools.partial(from_sketch, S, bucket.matrix.rank, side)
    tools = tools_for(config, bucket.device, bucket.dtype)
    bucket.put_basis(certain(find(tools=tools), find, tools))


def draw_omega(bucket: Bucket, config: GaLoreConfig, seed: int) -> Tensor:
    """The Gaussian test matrices of equal matrices, [pieces x blocks, n, k]."""
    blocks, m, n = bucket.matrix.lending_shape
    k = width_of_sketch(bucket.matrix, config, m, n)
    omega = torch.empty(len(bucket.pieces) * blocks, n, k, dtype=torch.float32, device=bucket.device)
    for i, (piece, b) in enumerate(itertools.product(bucket.pieces, range(blocks))):
        refresh = piece.owner.state["refreshes"]
        omega[i].normal_(generator=stream(bucket.device, seed, piece.name, "omega", refresh, b))
    return omega


def tools_for(config: GaLoreConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> Tools:
    """What to try first at a refresh on a device, for state of a dtype; ``CERTAIN`` where nothing is faster."""
    cuda = device.type == "cuda"
    by_kernel = wanted(config, device) and obstacle(device, dtype) is None
    find = _eigenvectors if by_kernel else by_library if cuda else by_eigh
    return Tools(by_cholesky if cuda else by_householder, find)


def _eigenvectors(C: Tensor) -> Tensor:
    """``core.linalg.Eigenvectors``: many at once by the kernel; the library takes one after the other."""
    from galore_trainer.kernels.jacobi import eigenvectors

    count, k, _ = C.shape
    if k == 1 or count * LIBRARY < k**3:
        return by_library(C)
    with torch.cuda.device_of(C):
        return eigenvectors(C)


def by_library(C: Tensor) -> Tensor:
    """``by_eigh`` raises an error at NaN, so zeros are decomposed; the result is multiplied by NaN anyway."""
    return by_eigh(C.nan_to_num())
