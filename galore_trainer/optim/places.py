"""Where the tensors of a bucket lie, for kernels: tables of addresses, in one upload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.streams import later_keys, rounding_key
from galore_trainer.optim import residual
from galore_trainer.optim.bucket import BASIS, MOMENTS, SCALE, Bucket
from galore_trainer.optim.local import AGE, RESIDUAL_AGE
from galore_trainer.optim.ops_torch import rounds
from galore_trainer.optim.param_groups import scale_of

GRADIENTS, RATES, KEYS = "gradients", "rates", "keys"
_LAYOUTS: dict[tuple[Any, ...], Any] = {}  # a few, by form, shape and strides


def noise_key(moments: Sequence[tuple[str, bool]]) -> str:
    """Under which name the random keys for the rounding of a pair of moments lie."""
    return f"{moments[0][0]} noise"


class StepTables:
    """Where tensors of equal weights lie, by name, and what each step brings: gradients, rates, random keys.

    Args:
        addresses: of first entries, one a weight, by name.
        dtypes: of these entries, by name.
        group: of the optimizer.
        names: of the weights.
        seeds: for each table of random keys the seed, and what follows a weight's name.
        calls: of the weights, so far.
        device: where they lie.

    Attributes:
        tables: ``kernels.tables.Scattered`` by name.
        group: of the optimizer.
    """

    def __init__(
        self,
        addresses: Mapping[str, list[int]],
        dtypes: Mapping[str, torch.dtype],
        group: Mapping[str, Any],
        names: Sequence[str],
        seeds: Mapping[str, tuple[int, str]],
        calls: Sequence[int],
        device: torch.device,
    ) -> None:
        from galore_trainer.kernels.tables import scatter

        self.group = group
        self._first_keys = {
            name: [rounding_key(seed, f"{weight}{purpose}", 0) for weight in names]
            for name, (seed, purpose) in seeds.items()
        }
        brought = self.brought(calls)
        every = {**addresses, **brought}
        self.tables = scatter(every, {**dict.fromkeys(brought, torch.int64), **dtypes}, device)

    @property
    def scale(self) -> float:
        """Factor on the rate, as the group has it now."""
        return 1.0

    def brought(self, calls: Sequence[int]) -> dict[str, list[int]]:
        """What a step brings beside gradients, by name: the rates of the group as they are now, and random keys."""
        from galore_trainer.kernels.tables import packed

        lr = float(self.group["lr"])  # torch takes tensors, too
        rate = packed(lr * self.scale, lr * self.group["weight_decay"])
        keys = {name: later_keys(first, calls) for name, first in self._first_keys.items()}
        return {RATES: [rate] * len(calls), **keys}

    def renew(self, tables: Mapping[str, Tensor], alignment: int) -> None:
        """Take other tables of what a step brings, and of gradients of the same layout and dtype.

        Args:
            tables: by name.
            alignment: of the gradients, as ``kernels.tables.Scattered`` has it.
        """
        for name, table in tables.items():
            self.tables[name] = self.tables[name]._replace(addresses=table)
        self.tables[GRADIENTS] = self.tables[GRADIENTS]._replace(alignment=alignment)

    @property
    def rates(self) -> Tensor:
        """``kernels.tables.packed`` of lr x scale and lr x weight decay, int64 [weights]."""
        rates: Tensor = self.tables[RATES].addresses
        return rates

    @property
    def keys(self) -> Tensor | None:
        """For the rounding of bfloat16 weights, int64 [weights]; None rounds to nearest."""
        return self.tables[KEYS].addresses if KEYS in self.tables else None

    def __getitem__(self, name: str) -> Any:
        """Weights, gradients, or tensors of the state by their key."""
        return self.tables[name]

    def get(self, name: str) -> Any:
        """The same; None where there are none."""
        return self.tables.get(name)


class Places(StepTables):
    """Where everything of a bucket lies, by key of the state or name; one upload for all of it.

    Attributes:
        of_weights, of_gradients: how the logical matrices lie in them; None for gradients that were not kept whole.
        moves_state: whether moments are among them; else torch moves those.
        moves_small_state: whether they have 16 or 8 bits.
    """

    def __init__(self, bucket: Bucket, config: GaLoreConfig, seed: int) -> None:
        from galore_trainer.kernels.routes import route_of

        first = bucket.pieces[0]
        self._config = config
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
        self.moves_state = bits == 32 or self.moves_small_state
        if self.moves_state:
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
            columns[GRADIENTS] = self._begin(bucket, [piece.grad for piece in bucket.pieces])
            dtypes[GRADIENTS] = first.grad.dtype
        elif moves_residual:
            sampled = bucket.kept(lambda grad: grad.sampled)
            self._alive.append(sampled)
            columns["sampled"] = [x.data_ptr() for x in bucket.split(sampled)]
            dtypes["sampled"] = sampled.dtype
        seeds: dict[str, tuple[int, str]] = {}
        if self.moves_small_state:
            for moments in (MOMENTS, *((residual.MOMENTS,) if moves_residual else ())):
                seeds[noise_key(moments)] = galore["seed"], f"|{noise_key(moments)}"
        if rounds(first.weight, config):
            seeds[KEYS] = seed, ""
        names, calls = zip(*((piece.name, piece.owner.state["calls"]) for piece in bucket.pieces), strict=True)
        super().__init__(columns, dtypes, bucket.group, names, seeds, calls, bucket.device)

    @property
    def scale(self) -> float:
        """On lift(N)."""
        return scale_of(self.group, self._config, self._matrix)

    def drop_copies(self) -> None:
        """Free the joined bases."""
        self._bases.clear()

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
            stored: Any = self.tables[BASIS]
            if stored.dtype == dtype and len(bucket.pieces) == 1:
                self._bases[dtype] = bucket.stored_bases()  # type: ignore[assignment]
            elif stored.dtype == torch.int8:
                self._bases[dtype] = bucket.P.to(dtype)
            else:
                self._bases[dtype] = join(stored, self._matrix.basis_shape, dtype)
        return self._bases[dtype]
