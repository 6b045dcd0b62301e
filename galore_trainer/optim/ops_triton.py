"""The six verbs of a step by Triton kernels, on a bucket of equal pieces where they lie: nothing is joined or copied.

``TritonOps`` does what ``TorchOps`` does for the pieces that the kernels take; ``buckets_for_triton`` leaves the others
to torch. Each bucket has its tables of addresses (``places.py``), which cost one upload; ``plan.py`` keeps them for the
steps that repeat this one. Triton is imported only where it is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.galore import largest_usable, usable_parts
from galore_trainer.core.precision import table
from galore_trainer.core.scaled import GROWTH
from galore_trainer.errors import OptionError
from galore_trainer.kernels import obstacle
from galore_trainer.optim import residual
from galore_trainer.optim.bucket import SCALE, Bucket, entries
from galore_trainer.optim.local import AGE, Piece
from galore_trainer.optim.ops_torch import Incoming, TorchOps
from galore_trainer.optim.places import Places, noise_key
from galore_trainer.targets.matrices import has_scaled

FIRST_ELEMENTS = 1 << 29  # ``bucket.entries`` that move in one go at first, then twice as many each time,
MOST_ELEMENTS = 1 << 30  # and at most: what is made of their projections is held meanwhile
LIMIT = largest_usable(torch.float32)


class TritonOps:
    """Moves weights by Triton kernels.

    Args:
        config, seed: of the optimizer.
    """

    def __init__(self, config: GaLoreConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self._torch = TorchOps(config, seed)

    def project(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """R [pieces x blocks, ...], and whether the gradients are usable, [pieces]."""
        from galore_trainer.kernels.project import project

        places = self._places(bucket)
        first, matrix, known = bucket.pieces[0], bucket.matrix, bucket.ok
        if first.kept is None:
            G = places["gradients"]
            P = places.bases(bucket, first.owner.compute_in or G.dtype)
            layout = places.of_gradients
            clips = self.config.max_grad_norm is not None and first.owner.energy is None
            if clips or has_scaled(matrix, self.config):
                lines = matrix.moment_shape[1 if matrix.side == "right" else 2]
                bucket.norms = torch.empty(len(P), lines, dtype=torch.float32, device=P.device)
            R, ok = project(G, layout, P, matrix.side, matrix.blocks, LIMIT, bucket.norms)
        else:
            R = bucket.kept(lambda grad: grad.projected)
            ok = usable_parts(R, len(bucket.pieces))
        return R, ok if known is None else known

    def lost(self, bucket: Bucket, R: Tensor, key: str) -> Tensor:
        """What the projection loses at the support, [pieces x blocks, rows, entries]."""
        from galore_trainer.kernels.residual import loss_at

        first, matrix, places = bucket.pieces[0], bucket.matrix, self._places(bucket)
        count = first.owner.state[first.prefix + key].shape[-1]
        if first.kept is None:
            G, layout = places["gradients"], places.of_gradients
        else:
            G, layout = places["sampled"], None
        P = places.bases(bucket, first.owner.compute_in or first.grad.dtype)  # in the precision that projected
        return loss_at(G, layout, places[key], R, P, matrix.side, matrix.blocks, count)

    def adam_(self, incoming: Sequence[Incoming], moments: Sequence[tuple[str, bool]], age: str) -> list[Tensor]:
        """Take R into a pair of moments, in place; the normalised update N."""
        from galore_trainer.kernels.adam import adam_
        from galore_trainer.kernels.scaled import Moments

        updates = []
        for bucket, R, ok in incoming:
            places, group = self._places(bucket), bucket.group
            scales = age == AGE and has_scaled(bucket.matrix, self.config)  # N - phi R is rounded, not N
            dtype = self._update_dtype(bucket) if age == AGE and not scales else torch.float32
            betas, eps = group["betas"], group["eps"]
            if group["galore"]["state_bits"] == 32:
                M, V = (places[key] for key, _ in moments)
                if scales:
                    N = torch.empty_like(R)
                    taken_in = Moments(M, V, places[age], betas, eps)
                    bucket.factors = self._line_factors(bucket, R, N, ok, taken_in)  # reads R once, and never N
                else:
                    N = adam_(M, V, places[age], R, ok, dtype=dtype, betas=betas, eps=eps, clip=bucket.clip)
            elif places.moves_small_state:
                N = self._adam_small(bucket, R, ok, moments, age, dtype)
            else:
                N = self._torch.adam_([Incoming(bucket, R, ok)], moments, age)[0].to(dtype)
            updates.append(N)
        return updates

    def _adam_small(
        self, bucket: Bucket, R: Tensor, ok: Tensor, moments: Sequence[tuple[str, bool]], age: str, dtype: torch.dtype
    ) -> Tensor:
        """``adam_`` for moments of 16 or 8 bits."""
        from galore_trainer.kernels.small_state import Small, adam_small_

        places, group = self._places(bucket), bucket.group
        M, V = (Small(places[key], places.get(key + SCALE)) for key, _ in moments)
        codes = table(True, R.device), table(False, R.device)
        keys = places[noise_key(moments)].addresses
        options = {"dtype": dtype, "betas": group["betas"], "eps": group["eps"], "clip": bucket.clip}
        return adam_small_(M, V, places[age], R, ok, keys, codes, **options)

    def line_factors(self, bucket: Bucket, R: Tensor, N: Tensor, ok: Tensor) -> tuple[Tensor, Tensor]:
        """As ``TorchOps.line_factors``."""
        return bucket.factors or self._line_factors(bucket, R, N, ok)

    def _line_factors(
        self, bucket: Bucket, R: Tensor, N: Tensor, ok: Tensor, moments: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Factors of lines; with moments, which take R in, N is written."""
        from galore_trainer.kernels.scaled import line_factors

        matrix = bucket.matrix
        assert bucket.norms is not None  # from ``project``
        return line_factors(
            R,
            N,
            bucket.norms,
            ok,
            matrix.blocks,
            matrix.side,
            residual_scale=self.config.residual_scale,
            noise=bucket.noise,
            moments=moments,
            clip=bucket.clip,
        )

    def limit_(self, updates: Sequence[tuple[Bucket, Any]], key: str) -> None:
        """As ``TorchOps.limit_``."""
        from galore_trainer.kernels.scaled import limit_growth_

        for bucket, update in updates:
            limit_growth_(update.lost, update.phi, self._places(bucket)[key], GROWTH)

    def apply_(
        self,
        bucket: Bucket,
        N: Tensor,
        ok: Tensor,
        dense: tuple[Tensor, Tensor] | None = None,
        sparse: tuple[str, Tensor] | None = None,
    ) -> None:
        """Move the weights; see ``TorchOps.apply_``."""
        from galore_trainer.kernels.scaled import without_projected
        from galore_trainer.kernels.update import Dense, add_at_, apply_update_

        matrix, places = bucket.matrix, self._places(bucket)
        layout = places.of_weights
        of_G = None
        if dense is not None:
            R, phi = dense
            N = without_projected(N, R, phi, ok, matrix.side, self._update_dtype(bucket))
            of_G = Dense(places["gradients"], places.of_gradients, phi)
        apply_update_(
            places["weights"],
            layout,
            N,
            places.bases(bucket, self._update_dtype(bucket)),
            matrix.side,
            ok,
            matrix.blocks,
            rates=places.rates,
            keys=places.keys,
            dense=of_G,
        )
        if sparse is not None:
            positions, N_S = sparse
            add_at_(places["weights"], layout, places[positions], N_S, ok, rates=places.rates, keys=places.keys)

    def _places(self, bucket: Bucket) -> Places:
        """Where the tensors of a bucket lie; looked up once, since that costs an upload."""
        if bucket.places is None:
            bucket.places = Places(bucket, self.config, self.seed)
        places: Places = bucket.places
        return places

    def _update_dtype(self, bucket: Bucket) -> torch.dtype:
        """What the factors of the lifted update are rounded to."""
        first = bucket.pieces[0]
        return first.owner.compute_in or first.weight.dtype


# ---------------------------------------------------------------------- which pieces the kernels take


def wanted(config: GaLoreConfig, device: torch.device) -> bool:
    """Whether kernels shall be used on a device, if they can be."""
    return config.kernels == "triton" or (config.kernels == "auto" and device.type == "cuda")


def why_not(weight: Tensor, grad: Tensor | None, config: GaLoreConfig) -> str | None:
    """Why the kernels do not move a weight; None where they do. ``grad`` is None where it is not whole."""
    if not wanted(config, weight.device):
        return "it lies elsewhere than on a GPU"
    dtypes = {weight.dtype} if grad is None else {weight.dtype, grad.dtype}
    return obstacle(weight.device, *dtypes)


def check_wanted(weights: Iterable[Any], config: GaLoreConfig) -> None:
    """Refuse projected weights that the kernels cannot move where ``kernels: triton`` asks for them.

    Raises:
        OptionError: there is an obstacle.
    """
    if config.kernels != "triton":
        return
    for w in weights:
        if (reason := why_not(w.weight, w.grad if w.kept is None else None, config)) is not None:
            way_out = f"{w.name}: {reason}. Use auto, which takes torch there."
            raise OptionError("galore.kernels", "triton", "weights that the kernels can move", way_out)


def buckets_for_triton(
    pieces: Iterable[Piece], config: GaLoreConfig, rest: list[Piece], most: int | None = None
) -> Iterator[Bucket]:
    """Buckets that the kernels move, each as soon as its pieces are there: the device works while the host goes on.

    Args:
        pieces: of one device; equal ones one after the other.
        config: of the optimizer.
        rest: takes the pieces that are left to torch.
        most: ``bucket.entries`` in a bucket; None begins with few, so that the device need not wait long.
    """
    if config.kernels == "torch":
        rest.extend(pieces)
        return
    size = FIRST_ELEMENTS if most is None else most
    for _, alike in itertools.groupby(pieces, key=lambda piece: piece.weight.shape):
        gathered: dict[tuple[Any, ...], list[Piece]] = {}
        entries_of: dict[tuple[Any, ...], int] = {}
        for piece in alike:
            key = _key(piece, config)
            if key not in gathered:
                gathered[key], entries_of[key] = [], entries(piece.matrix)
            members = gathered[key]
            members.append(piece)
            if (len(members) + 1) * entries_of[key] > size:
                del gathered[key]
                if _takes(members, config, rest):
                    yield Bucket(members)
                if most is None:
                    size = min(2 * size, MOST_ELEMENTS)
        for members in gathered.values():
            if _takes(members, config, rest):
                yield Bucket(members)


def _takes(members: list[Piece], config: GaLoreConfig, rest: list[Piece]) -> bool:
    """Whether the kernels move equal pieces; if not, ``rest`` takes them."""
    first = members[0]
    grad = first.grad if first.kept is None else None
    takes = why_not(first.weight, grad, config) is None and residual.takes_triton(first, config)
    if not takes:
        rest += members
    return takes


def _key(piece: Piece, config: GaLoreConfig) -> tuple[Any, ...]:
    """Equal for pieces that the kernels take in one go: the age of their bases does not matter to them."""
    p, g, matrix, owner = piece.weight, piece.grad, piece.matrix, piece.owner
    strides = None if piece.kept is None and p.is_contiguous() and g.is_contiguous() else (p.stride(), g.stride())
    known = (piece.kept is None, owner.ok is None, residual.kernel_phase(piece, config))
    return (id(owner.group), matrix.form, known, p.shape, strides, p.dtype, g.dtype, owner.compute_in, p.get_device())
