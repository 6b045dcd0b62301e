"""The residuals inside the optimizer's state.

The scaled residual keeps one number a logical matrix: ``residual_norm`` (after the matrix's prefix), float32: ||phi D||
in the step before, 0 before the first one.

The sparse residual has candidates first, then a support with moments of its own. Keys (after the piece's prefix):
``candidate_index`` and ``candidate_mean`` while warming up; ``residual_index``,
``residual_exp_avg`` and ``residual_exp_avg_sq`` afterwards. The age of these moments is one number a weight. The
residual begins with the first basis that comes from a whole gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core import residual, scaled
from galore_trainer.core.galore import unbiased, usable_parts
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.core.precision import Form, stored_form
from galore_trainer.core.sparse import Support, read_at
from galore_trainer.layouts.shard import Ranks
from galore_trainer.optim.bucket import MOMENTS as OF_PROJECTED
from galore_trainer.optim.bucket import Bucket
from galore_trainer.optim.local import AGE, RESIDUAL_AGE, LocalWeight, Piece
from galore_trainer.optim.ops_torch import Incoming
from galore_trainer.targets.matrices import has_scaled, has_sparse, support_shape

NORM = "residual_norm"
INDEX, CANDIDATE_INDEX, MEAN = "residual_index", "candidate_index", "candidate_mean"
MOMENTS = (("residual_exp_avg", True), ("residual_exp_avg_sq", False))
"""Keys of the sparse moments, and whether they have a sign."""
ROWS = (CANDIDATE_INDEX, MEAN, INDEX, *(key for key, _ in MOMENTS))
"""Keys of what has a row for each row of a weight."""
PHASE_OF = {CANDIDATE_INDEX: 1, MEAN: 1}
"""The phase in which a key exists; of all others it is 2."""


# ---------------------------------------------------------------------- scaled


class Scaled(NamedTuple):
    """The scaled residual of a bucket in one step.

    Attributes:
        R: projected gradients.
        phi: [pieces x blocks, lines].
        lost: (phi_j ||D_j||)^2 of the lines, float64 [pieces x blocks, lines]; 0 for those that another process owns.
    """

    R: Tensor
    phi: Tensor
    lost: Tensor

    def squared_size(self, pieces: int) -> Tensor:
        """||phi D||^2 of each of so many pieces, float64."""
        return self.lost.reshape(pieces, -1).sum(dim=1)


def start_norms(state: MutableMapping[str, Any], matrices: Iterable[LogicalMatrix], config: GaLoreConfig) -> None:
    """Make ``residual_norm`` where it is missing; without it there is no limit in the first step."""
    for matrix in matrices:
        if has_scaled(matrix, config) and matrix.prefix + NORM not in state:
            state[matrix.prefix + NORM] = torch.zeros((), dtype=torch.float32, device=state["skipped"].device)


def scale_lost(bucket: Bucket, ops: Any, R: Tensor, N: Tensor, ok: Tensor, config: GaLoreConfig) -> Scaled | None:
    """The scaled residual before its limit; None for matrices without one.

    Args:
        bucket: of this step.
        ops: find its factors.
        R, N: projected gradients and normalised updates.
        ok: [pieces].
        config: of the optimizer.
    """
    if not has_scaled(bucket.matrix, config):
        return None
    phi, by_line = ops.line_factors(bucket, R, N, ok)
    if any(piece.foreign is not None for piece in bucket.pieces):
        for piece, lines in zip(bucket.pieces, bucket.split(by_line), strict=True):
            if piece.foreign is not None:
                lines.view(-1)[piece.foreign] = 0.0
    return Scaled(R, phi, by_line)


def by_limit(weights: Iterable[LocalWeight], config: GaLoreConfig) -> dict[Ranks | None, list[LocalWeight]]:
    """Weights by the processes that limit their scaled residual together; None for those that need no other process."""
    parts: dict[Ranks | None, list[LocalWeight]] = {}
    for w in weights:
        parts.setdefault(w.shard.ranks if config.scales_residual else None, []).append(w)
    return parts


def limit_growth(updates: Iterable[tuple[Bucket, Scaled | None]], ops: Any) -> None:
    """Limit phi of whole weights so that ||phi D|| of a logical matrix grows by at most 1 % a step, in place."""
    scaled_ones = [(bucket, update) for bucket, update in updates if update is not None]
    if scaled_ones:
        ops.limit_(scaled_ones, NORM)


def limit_growth_across(
    updates: Iterable[tuple[Bucket, Scaled | None]],
    config: GaLoreConfig,
    ranks: Ranks,
    weights: Sequence[LocalWeight],
) -> None:
    """The same for weights that are cut.

    Args:
        updates: of this process.
        config: of the optimizer.
        ranks: the processes among which the weights are cut.
        weights: all of them, also those without a row here.
    """
    scaled_ones = [(bucket, update) for bucket, update in updates if update is not None]
    pairs = [(w, m) for w in weights for m in w.matrices if has_scaled(m, config)]
    if not pairs:
        return
    norms = [w.state[matrix.prefix + NORM] for w, matrix in pairs]
    place = {(id(w), matrix.prefix): i for i, (w, matrix) in enumerate(pairs)}
    squares = ranks.sum(_sums(scaled_ones, place, norms[0].device))
    factors, new = scaled.limit(squares.sqrt(), torch.stack(norms))
    torch._foreach_copy_(norms, list(new.unbind()))
    for bucket, update in scaled_ones:
        of_pieces = torch.stack([factors[place[id(p.owner), p.matrix.prefix]] for p in bucket.pieces])
        update.phi.mul_(bucket.spread(of_pieces)[:, :, 0])


def _sums(
    updates: Iterable[tuple[Bucket, Scaled]], place: Mapping[tuple[int, str], int], device: torch.device
) -> Tensor:
    """||phi D||^2 of the rows of every logical matrix that this process owns, [matrices], float64."""
    parts: list[list[Tensor]] = [[torch.zeros((), dtype=torch.float64, device=device)] for _ in place]
    for bucket, update in updates:
        for piece, part in zip(bucket.pieces, update.squared_size(len(bucket.pieces)).unbind(), strict=True):
            parts[place[id(piece.owner), piece.matrix.prefix]].append(part)
    return torch.stack([functools.reduce(torch.add, some) for some in parts])


# ---------------------------------------------------------------------- sparse


def has_begun(state: Any, config: GaLoreConfig) -> bool:
    """Whether a weight has had its first basis from a whole gradient."""
    begun: bool = state["refreshes"] > config.sketches_first
    return begun


def start_ages(w: LocalWeight, config: GaLoreConfig) -> tuple[str, ...]:
    """Make the age of the sparse moments where it begins; keys of the ages that grow in this step of a weight.

    Every process that holds the weight comes to the same answer, whatever rows it holds, so that checkpoints agree. The
    age of the sparse moments is made in the step in which the support is chosen; after a warm-up they take in their
    first gradient one step later.
    """
    state = w.state
    if not has_begun(state, config) or not any(has_sparse(matrix, config) for matrix in w.matrices):
        return (AGE,)
    if RESIDUAL_AGE not in state:
        if not _is_last_of_warm_up(state, config):
            return (AGE,)
        state[RESIDUAL_AGE] = torch.zeros_like(state[AGE])
        if config.residual_warmup_steps > 0:
            return (AGE,)
    return (AGE, RESIDUAL_AGE)


def lost_entries(bucket: Bucket, ops: Any, R: Tensor, ok: Tensor, config: GaLoreConfig) -> Tensor | None:
    """D at the support, [pieces x blocks, lines, entries]; None without a residual, and while candidates warm up.

    Args:
        bucket: of this step.
        ops: forms D.
        R: projected gradients.
        ok: [pieces]; becomes 0.0 where D is not usable: it can be too large where the projection sees nothing of it.
        config: how many entries, how long a warm-up.
    """
    first = bucket.pieces[0].owner
    if not (has_sparse(bucket.matrix, config) and has_begun(first.state, config)):
        return None
    if not bucket.has(INDEX):
        _warm_up(bucket, ops, R, bucket.spread(ok), config)
    if RESIDUAL_AGE not in first.age_keys:
        return None  # still warming up
    D: Tensor = ops.lost(bucket, R, INDEX)
    if bucket.ok is None:
        ok.mul_(usable_parts(D, len(bucket.pieces)))
    return D


def take_in(
    projected: Sequence[Incoming],
    updates: Sequence[Tensor],
    lost: Sequence[Tensor | None],
    ops: Any,
    config: GaLoreConfig,
) -> list[Tensor | None]:
    """Take lost entries into their moments.

    Args:
        projected: gradients of some buckets, which their moments have taken in.
        updates: N, for each bucket.
        lost: from ``lost_entries``, for each bucket.
        ops: takes them in.
        config: gives ``residual_mode`` and ``residual_scale``.

    Returns:
        For each bucket what the entries add to lift(N): N_S x residual_scale, or under ``residual_mode: moments`` what
        puts the corrected update in its place; None where nothing was lost.
    """
    if config.residual_mode == "moments":
        pairs = zip(projected, updates, lost, strict=True)
        return [None if D is None else _corrected(bucket, N, D, ok, config) for (bucket, _, ok), N, D in pairs]
    incoming = [Incoming(bucket, D, ok) for (bucket, _, ok), D in zip(projected, lost, strict=True) if D is not None]
    sparse = ops.adam_(incoming, MOMENTS, RESIDUAL_AGE)
    if config.residual_scale != 1.0:
        sparse = [N_S * config.residual_scale for N_S in sparse]
    in_order = iter(sparse)
    return [None if D is None else next(in_order) for D in lost]


def _corrected(bucket: Bucket, N: Tensor, D: Tensor, ok: Tensor, config: GaLoreConfig) -> Tensor:
    """size N_S - lift(N)[S]: at S the update of corrected moments takes the place of the lifted one.

    Args:
        bucket: of this step.
        N, D: the lifted update, and what was lost at S.
        ok: [pieces].
        config: gives ``residual_scale``.
    """
    support, spread = bucket.support(INDEX), bucket.spread(ok)
    lifted_at = functools.partial(residual.lifted_at, P=bucket.P, side=bucket.matrix.side, support=support)
    betas, (first, signed) = bucket.group["betas"], OF_PROJECTED[0]
    M = unbiased(bucket.get_moment(first, signed=signed), bucket.ages(AGE) + spread, betas[0])
    m, v = (bucket.get_moment(key, signed=signed) for key, signed in MOMENTS)
    m, v, N_S = residual.correct(
        m,
        v,
        bucket.ages(RESIDUAL_AGE),
        bucket.clipped(D),
        bucket.clipped(bucket.gradient_at(INDEX)),
        lifted_at(M),
        spread,
        betas=betas,
        eps=bucket.group["eps"],
    )
    for (key, signed), value in zip(MOMENTS, (m, v), strict=True):
        bucket.put_moment(key, value, signed=signed, ok=spread)
    size = config.residual_scale / bucket.matrix.auto_scale  # moves an entry of S as far as lift(N) does on average
    return size * N_S - lifted_at(N)


def in_place_of_scaled(bucket: Bucket, update: Scaled, N_S: Tensor, D: Tensor, ok: Tensor) -> Tensor:
    """N_S - (phi D)[S]: at S the sparse update takes the place of the scaled one.

    Args:
        bucket: of this step.
        update: the scaled residual, limited.
        N_S, D: the sparse update, and what was lost at S.
        ok: [pieces].
    """
    phi = scaled.along_lines(update.phi, bucket.matrix.side).expand(-1, bucket.matrix.block_rows, bucket.matrix.columns)
    return torch.where(bucket.spread(ok) > 0.0, N_S - read_at(phi, bucket.support(INDEX)) * D, 0.0)


def make_support(w: LocalWeight, config: GaLoreConfig) -> None:
    """The state of a residual whose support was chosen, of zeros."""
    for piece in w.pieces_of_state():
        if has_sparse(piece.matrix, config):
            index = torch.zeros(support_shape(piece.matrix, config), dtype=torch.int32, device=piece.weight.device)
            _make_moments(Bucket([piece]), index)
            w.state[RESIDUAL_AGE] = torch.zeros_like(w.state[AGE])


def takes_triton(piece: Piece, config: GaLoreConfig) -> bool:
    """Whether the kernels know what the residual of a piece needs in this step.

    Candidates warm up in torch, and torch corrects moments.
    """
    if not (has_sparse(piece.matrix, config) and has_begun(piece.state, config)):
        return True
    separate = config.residual_mode == "separate"
    return separate and config.residual_selection == "row" and piece.prefix + INDEX in piece.state


def kernel_phase(piece: Piece, config: GaLoreConfig) -> Any:
    """Equal for pieces that the kernels take together."""
    if config.sparse_percent == 0.0:
        return None
    return has_begun(piece.state, config), piece.prefix + INDEX in piece.state


def forms(
    state: Mapping[str, Any], matrix: LogicalMatrix, config: GaLoreConfig, wide: torch.dtype
) -> Iterator[tuple[str, Form]]:
    """Key and form of every tensor that a saved state holds for the residual of one matrix, but scales of moments.

    Args:
        state: of a whole weight, as it is saved.
        matrix: one of the weight's.
        config: of the optimizer.
        wide: the dtype of state in 32 bits.
    """
    if has_scaled(matrix, config):
        yield NORM, Form((), torch.float32)
    if not has_sparse(matrix, config) or int(state.get("refreshes", 0)) <= config.sketches_first:
        return
    blocks, lines, entries = support_shape(matrix, config)
    line = matrix.block_rows * matrix.columns // lines  # entries of a line, in which positions count
    if matrix.prefix + CANDIDATE_INDEX in state:
        wide_entries = state[matrix.prefix + CANDIDATE_INDEX].shape[-1]  # as many as the lines hold, at most
        yield CANDIDATE_INDEX, Form((blocks, lines, wide_entries), torch.int32, below=line)
        yield MEAN, Form((blocks, lines, wide_entries), wide)
        return
    yield INDEX, Form((blocks, lines, entries), torch.int32, below=line)
    yield RESIDUAL_AGE, Form((), torch.float32)
    for key, _ in MOMENTS:
        yield key, stored_form((blocks, lines, entries), config.state_bits, wide)


def reset_residual(bucket: Bucket) -> None:
    """Start the sparse moments anew, on the same support (``momentum_transfer: reset``)."""
    if bucket.has(INDEX):
        for key, signed in MOMENTS:
            bucket.put_moment(key, torch.zeros_like(bucket.get_moment(key, signed=signed)), signed=signed)


def _is_last_of_warm_up(state: Any, config: GaLoreConfig) -> bool:
    last: bool = state["calls"] - state["born"] + 1 >= config.residual_warmup_steps
    return last


def _warm_up(bucket: Bucket, ops: Any, R: Tensor, ok: Tensor, config: GaLoreConfig) -> None:
    """Average D at the candidates; at the end of the warm-up the largest averages become the support."""
    _, lines, entries = support_shape(bucket.matrix, config)
    if not bucket.has(CANDIDATE_INDEX):
        G = bucket.G
        assert G is not None  # this step's basis came from it
        wide = entries if config.residual_warmup_steps == 0 else entries * residual.CANDIDATES_PER_ENTRY
        index, D = residual.largest_lost(G, R, bucket.P, bucket.matrix.side, lines, wide)
        bucket.put(CANDIDATE_INDEX, index)
        bucket.put(MEAN, torch.zeros(index.shape, dtype=R.dtype, device=R.device))
    elif bucket.G is None or residual.samples(R.device):
        D = ops.lost(bucket, R, CANDIDATE_INDEX)
    else:  # where entries are gathered one product is cheaper than four times as many of them
        support = Support(bucket.get(CANDIDATE_INDEX), bucket.matrix.columns)
        D = read_at(residual.dense_loss(bucket.G, R, bucket.P, bucket.matrix.side), support)
    D = torch.where(ok > 0.0, bucket.clipped(D), 0.0)
    share = ok.to(D.dtype) * (1.0 - bucket.group["betas"][0])
    bucket.put(MEAN, torch.lerp(bucket.get(MEAN), D, share))
    if _is_last_of_warm_up(bucket.pieces[0].owner.state, config):
        _make_moments(bucket, residual.best_candidates(bucket.pop(CANDIDATE_INDEX), bucket.pop(MEAN), entries))


def _make_moments(bucket: Bucket, index: Tensor) -> None:
    """Store a support, with moments of zeros."""
    bucket.put(INDEX, index)
    for key, signed in MOMENTS:
        bucket.put_moment(key, torch.zeros(index.shape, dtype=bucket.dtype, device=index.device), signed=signed)
