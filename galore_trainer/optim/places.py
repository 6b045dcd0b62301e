"""Where the tensors of a bucket lie, for kernels: tables of addresses, in one upload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.streams import rounding_key
from galore_trainer.optim import residual
from galore_trainer.optim.bucket import BASIS, MOMENTS, SCALE, Bucket
from galore_trainer.optim.local import AGE, RESIDUAL_AGE
from galore_trainer.optim.ops_torch import rounds
from galore_trainer.optim.param_groups import scale_of

_LAYOUTS: dict[tuple[Any, ...], Any] = {}  # a few, by form, shape and strides


def noise_key(moments: Sequence[tuple[str, bool]]) -> str:
    """Under which name the random keys for the rounding of a pair of moments lie."""
    return f"{moments[0][0]} noise"


class Places:
    """Where everything of a bucket lies, by key of the state or name; one upload for all of it.

    Attributes:
        keys: for the rounding of bfloat16 weights, int64 [pieces]; None rounds to nearest.
        rates: ``kernels.tables.packed`` of lr x scale and lr x weight decay, int64 [pieces].
        of_weights, of_gradients: how the logical matrices lie in them; None for gradients that were not kept whole.
        moves_small_state: whether moments of 16 and 8 bits are among them; else torch moves those.
    """

    def __init__(self, bucket: Bucket, config: GaLoreConfig, seed: int) -> None:
        from galore_trainer.kernels.routes import route_of
        from galore_trainer.kernels.tables import scatter

        first = bucket.pieces[0]
        self._matrix = bucket.matrix  # not the bucket, which keeps these places: a cycle would outlive the step
        self.of_weights = self.layout(first.weight)
        self.of_gradients: Any = self.layout(first.grad) if first.kept is None else None
        self._bases: dict[torch.dtype, Tensor] = {}
        self._alive: list[Any] = []  # tensors that live as long as their addresses
        tensors: dict[str, list[Tensor]] = {BASIS: self._stored_bases(bucket)}
        if bucket.has(residual.NORM) and first.block_index is None:  # of whole weights
            tensors[residual.NORM] = bucket.stored(residual.NORM)
        moves_residual = bucket.has(residual.INDEX)
        if moves_residual:
            tensors[residual.INDEX] = bucket.stored(residual.INDEX)
        galore = bucket.group["galore"]
        bits = galore["state_bits"]
        self.moves_small_state = bits < 32 and route_of(bucket.matrix.rank, torch.bfloat16).small_state
        if bits == 32 or self.moves_small_state:
            for moment, _ in (*MOMENTS, *residual.MOMENTS):
                for key in (moment, moment + SCALE):
                    if bucket.has(key):
                        tensors[key] = bucket.stored(key) if bits == 32 else bucket.stored_contiguous(key)
            for key in (AGE, *((RESIDUAL_AGE,) if moves_residual else ())):
                tensors[key] = [piece.owner.state[key] for piece in bucket.pieces]
        columns = {key: [x.data_ptr() for x in members] for key, members in tensors.items()}
        dtypes = {key: members[0].dtype for key, members in tensors.items()}
        columns["weights"] = self._begin(bucket, [piece.weight for piece in bucket.pieces])
        dtypes["weights"] = first.weight.dtype
        if first.kept is None:
            columns["gradients"] = self._begin(bucket, [piece.grad for piece in bucket.pieces])
            dtypes["gradients"] = first.grad.dtype
        elif moves_residual:
            sampled = bucket.kept(lambda grad: grad.sampled)
            self._alive.append(sampled)
            columns["sampled"] = [x.data_ptr() for x in bucket.split(sampled)]
            dtypes["sampled"] = sampled.dtype
        if self.moves_small_state:
            for moments in (MOMENTS, *((residual.MOMENTS,) if moves_residual else ())):
                key = noise_key(moments)
                columns[key] = [
                    rounding_key(galore["seed"], f"{piece.name}|{key}", piece.owner.state["calls"])
                    for piece in bucket.pieces
                ]
                dtypes[key] = torch.int64
        noise = None
        if rounds(first.weight, config):
            noise = [rounding_key(seed, piece.name, piece.owner.state["calls"]) for piece in bucket.pieces]
        self._group, self._scale = bucket.group, scale_of(bucket.group, config, bucket.matrix)
        columns["rates"], dtypes["rates"] = [self.rate()] * len(bucket.pieces), torch.int64
        self._scattered, self.keys = scatter(columns, dtypes, noise, bucket.device)
        self.rates = self._scattered["rates"].addresses

    def rate(self) -> int:
        """The rates of the group as they are now."""
        from galore_trainer.kernels.tables import packed

        lr = float(self._group["lr"])  # torch takes tensors, too
        return packed(lr * self._scale, lr * self._group["weight_decay"])

    def renew(self, gradients: Tensor, alignment: int, rates: Tensor, keys: Tensor | None) -> None:
        """Take new gradients of the same layout and dtype, and what else a new step brings; the rest stays."""
        self._scattered["gradients"] = self._scattered["gradients"]._replace(addresses=gradients, alignment=alignment)
        self.rates, self.keys = rates, keys

    def drop_copies(self) -> None:
        """Free the joined bases."""
        self._bases.clear()

    def __getitem__(self, name: str) -> Any:
        """Weights, gradients, or tensors of the state by their key."""
        return self._scattered[name]

    def get(self, name: str) -> Any:
        """The same; None where there are none."""
        return self._scattered.get(name)

    def _stored_bases(self, bucket: Bucket) -> list[Any]:
        """The stored bases; copies where a piece has some of a matrix's bases that do not follow one another."""
        stored = [piece.basis(BASIS) for piece in bucket.pieces]
        if bucket.pieces[0].block_index is not None:
            self._alive += stored
        return stored

    def _begin(self, bucket: Bucket, stored: Sequence[Tensor]) -> list[int]:
        """Where the logical matrices begin in weights or gradients."""
        row = stored[0].element_size() * self.layout(stored[0]).row_stride
        return [x.data_ptr() + piece.matrix.start * row for x, piece in zip(stored, bucket.pieces, strict=True)]

    def layout(self, stored: Tensor) -> Any:
        """How the logical matrices lie in tensors like this one."""
        matrix = self._matrix
        key = (matrix.form, stored.shape, stored.stride())
        if key not in _LAYOUTS:
            from galore_trainer.kernels.tables import Layout

            _LAYOUTS[key] = Layout.of(matrix.rows_of(stored))
        return _LAYOUTS[key]

    def bases(self, bucket: Bucket, dtype: torch.dtype) -> Tensor:
        """The bases of all pieces of this bucket in a dtype, [pieces x blocks, ...]."""
        from galore_trainer.kernels.project import join

        if dtype not in self._bases:
            stored: Any = self._scattered[BASIS]
            if stored.dtype == dtype and len(bucket.pieces) == 1:
                self._bases[dtype] = bucket.stored_bases()  # type: ignore[assignment]
            elif stored.dtype == torch.int8:
                self._bases[dtype] = bucket.P.to(dtype)
            else:
                self._bases[dtype] = join(stored, self._matrix.basis_shape, dtype)
        return self._bases[dtype]
