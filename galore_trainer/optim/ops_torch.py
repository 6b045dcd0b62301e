"""The five verbs of a step by torch: what ``core/`` spells out, on a bucket of equal pieces."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core import galore
from galore_trainer.core.galore import usable_parts
from galore_trainer.core.residual import lost_at
from galore_trainer.core.scaled import Dense, limit, line_factors, squared_norms
from galore_trainer.core.sparse import part_of
from galore_trainer.core.streams import stream
from galore_trainer.optim.bucket import Bucket
from galore_trainer.optim.param_groups import scale_of
from galore_trainer.targets.matrices import has_scaled


class Incoming(NamedTuple):
    """What the moments of a bucket take in.

    Attributes:
        bucket: of equal pieces.
        R: projected gradients, or the residual's entries, in the moments' shape and the bucket's dtype.
        ok: [pieces], 1.0, or 0.0: there the moments stay, bit for bit, and the update is 0.
    """

    bucket: Bucket
    R: Tensor
    ok: Tensor


class TorchOps:
    """Moves weights by torch.

    Args:
        config, seed: of the optimizer.
    """

    def __init__(self, config: GaLoreConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def project(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """R [pieces x blocks, ...], and whether the gradients are usable, [pieces]."""
        G, P, side = bucket.G, bucket.P, bucket.matrix.side
        if G is None:
            R = bucket.kept(lambda grad: grad.projected)
        else:
            R = galore.project(G, P, side)
        if has_scaled(bucket.matrix, self.config):  # now, while a CPU's cache holds the gradients
            bucket.norms = torch.cat([squared_norms(G, side, R.dtype) for G in bucket.gradients()])
        ok = bucket.ok
        return R, usable_parts(R, len(bucket.pieces)) if ok is None else ok

    def lost(self, bucket: Bucket, R: Tensor, key: str) -> Tensor:
        """What the projection loses at the positions stored under ``key``, in their shape."""
        return lost_at(bucket.gradient_at(key), R, bucket.P, bucket.matrix.side, bucket.support(key))

    def adam_(self, incoming: Sequence[Incoming], moments: Sequence[tuple[str, bool]], age: str) -> list[Tensor]:
        """Take R, clipped, into a pair of moments of each bucket, in place; the normalised updates N.

        Single matrices on a CPU go through one call of torch's fused AdamW, which takes all of them.

        Args:
            incoming: each bucket once.
            moments: keys of the first and the second moment, and whether they have a sign.
            age: key of their age, which stays: it is counted when every piece of a weight has moved.
        """
        updates: list[Tensor] = []
        joined: dict[tuple[Any, ...], list[tuple[Bucket, Tensor, Tensor]]] = defaultdict(list)
        for bucket, R, ok in incoming:
            betas, eps, R = bucket.group["betas"], bucket.group["eps"], bucket.clipped(R)
            if type(R) is Tensor and _is_simple(bucket):
                N = torch.zeros_like(R, memory_format=torch.contiguous_format)
                if ok.item() > 0.0:
                    joined[tuple(betas), eps].append((bucket, R.contiguous(), N))
            else:
                M, V = (bucket.get_moment(key, signed=signed) for key, signed in moments)
                spread = bucket.spread(ok)
                M, V, _, N = galore.adam(M, V, bucket.ages(age), R, spread, betas=betas, eps=eps)
                for (key, signed), value in zip(moments, (M, V), strict=True):
                    bucket.put_moment(key, value, signed=signed, ok=spread)
            updates.append(N)
        for (betas, eps), members in joined.items():
            _joined_adam_(members, [key for key, _ in moments], age, betas, eps)
        return updates

    def line_factors(self, bucket: Bucket, R: Tensor, N: Tensor, ok: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the scaled residual for each line, and the squared norms of what they scale; see ``core``.

        They are those of gradients and projections as they are: phi is ||N|| / ||R||, so that what clipping takes from
        D it gives to phi. Where it makes a gradient zero, they are 0.
        """
        assert bucket.norms is not None  # from ``project``
        if bucket.clip is not None:
            ok = ok * (bucket.clip > 0.0)
        return line_factors(
            bucket.norms,
            R,
            N,
            bucket.spread(ok),
            bucket.matrix.side,
            residual_scale=self.config.residual_scale,
            noise=bucket.noise,
        )

    def limit_(self, updates: Sequence[tuple[Bucket, Any]], key: str) -> None:
        """Limit phi of the scaled residual, in place, so that what it moves grows by at most 1 % a step.

        Args:
            updates: buckets with their ``residual.Scaled``.
            key: of what it moved in the step before, a number a piece, which is written.
        """
        norms = [norm for bucket, _ in updates for norm in bucket.stored(key)]
        squares = torch.cat([update.squared_size(len(bucket.pieces)) for bucket, update in updates])
        factors, new = limit(squares.sqrt(), torch.stack(norms))
        torch._foreach_copy_(norms, list(new.unbind()))
        split = factors.split([len(bucket.pieces) for bucket, _ in updates])
        for (bucket, update), of_pieces in zip(updates, split, strict=True):
            update.phi.mul_(bucket.spread(of_pieces)[:, :, 0])

    def apply_(
        self,
        bucket: Bucket,
        N: Tensor,
        ok: Tensor,
        dense: tuple[Tensor, Tensor] | None = None,
        sparse: tuple[str, Tensor] | None = None,
    ) -> None:
        """Move the weights.

        Args:
            bucket: of this step.
            N: normalised updates.
            ok: [pieces].
            dense: R and phi of the scaled residual.
            sparse: the key of positions, and the update of these entries.
        """
        config, group, matrix = self.config, bucket.group, bucket.matrix
        residual = None if sparse is None else (bucket.support(sparse[0]), sparse[1])
        parts = [bucket.split(x) for x in (N, bucket.P, bucket.spread(ok), *(dense or ()))]
        for i, (piece, N_i, P_i, ok_i, *dense_i) in enumerate(zip(bucket.pieces, *parts, strict=True)):
            W = piece.matrix.take(piece.weight)
            galore.apply_update_(
                W,
                N_i,
                P_i,
                matrix.side,
                lr=float(group["lr"]),
                scale=scale_of(group, config, matrix),
                weight_decay=group["weight_decay"],
                ok=ok_i,
                dense=Dense(piece.matrix.take(piece.grad), *dense_i) if dense_i else None,
                sparse=part_of(residual, i, matrix.blocks),
                generator=weight_noise(piece.weight, piece.name, piece.owner.state["calls"], config, self.seed),
            )
            piece.matrix.put(piece.weight, W)


def weight_noise(p: Tensor, name: str, calls: int, config: GaLoreConfig, seed: int) -> torch.Generator | None:
    """The noise that rounds a weight stochastically in one step; None rounds to nearest."""
    return stream(p.device, seed, name, "rounding", calls) if rounds(p, config) else None


def rounds(p: Tensor, config: GaLoreConfig) -> bool:
    """Whether a weight is rounded stochastically."""
    return p.dtype == torch.bfloat16 and config.stochastic_rounding


def _is_simple(bucket: Bucket) -> bool:
    """One matrix on a CPU with unrounded moments. Without eps 0 / 0 must give 0, which ``core`` alone sees to."""
    bits, eps = bucket.group["galore"]["state_bits"], bucket.group["eps"]
    return len(bucket.pieces) == 1 and bucket.device.type == "cpu" and bits == 32 and eps > 0.0


def _joined_adam_(
    members: Sequence[tuple[Bucket, Tensor, Tensor]],
    keys: Sequence[str],
    age: str,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """N, of zeros, becomes what AdamW makes of a weight at the learning rate -1."""
    buckets, R, N = zip(*members, strict=True)
    first, second = ([bucket.get(key) for bucket in buckets] for key in keys)
    ages = torch._foreach_add([bucket.pieces[0].owner.state[age] for bucket in buckets], 1.0)
    torch.ops.aten._fused_adamw_(  # what torch.optim.AdamW calls, without its wrappers, which take as long here
        N,
        R,
        first,
        second,
        [],
        ages,
        lr=-1.0,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
