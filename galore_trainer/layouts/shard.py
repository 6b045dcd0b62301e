"""Which entries of a weight this process holds, and reductions over the processes that share the weight.

A weight is stored row by row: entry (i, j) of M rows and N columns has the position i * N + j. A process holds the
positions ``start:stop``. A whole weight is the shard that holds every row. FSDP2 cuts between rows. ZeRO cuts anywhere:
a row may lie on several processes, and a process may hold nothing. The shards of all processes are disjoint and cover
the weight.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

GLOO_TIMEOUT = datetime.timedelta(hours=6)  # gloo notices a dead process at once, NCCL's timeout a hanging one


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that share a weight (a ``torch.distributed`` group)."""

    group: Any

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes, in place where ``x`` allows; collective."""
        return self._reduce(x, dist.ReduceOp.SUM)

    @property
    def count(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self.group)

    @cached_property
    def hosts(self) -> Ranks:
        """The same processes as a gloo group, which reduces CPU tensors without waiting for a GPU; collective."""
        if dist.get_backend(self.group) == "gloo":
            return self
        members = None if self.group is None else dist.get_process_group_ranks(self.group)
        only_members = members is not None  # processes outside the group do not make this call
        return Ranks(dist.new_group(members, GLOO_TIMEOUT, "gloo", use_local_synchronization=only_members))

    def differing(self, x: Tensor) -> Tensor:
        """Where the processes hold different numbers, boolean in the shape of ``x``; collective."""
        return self._reduce(x.clone(), dist.ReduceOp.MIN) != self._reduce(x.clone(), dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        """All-reduce. Offloaded CPU tensors go through the GPU where the backend is NCCL, which needs CUDA tensors."""
        x = x.contiguous()
        reduced = x
        if x.device.type == "cpu" and dist.get_backend(self.group) == "nccl":
            reduced = x.to(torch.device("cuda", torch.cuda.current_device()))
        dist.all_reduce(reduced, operation, group=self.group)
        return reduced.to(x.device)


def checksum(x: Tensor) -> Tensor:
    """Sum of the bit patterns of all entries as integers, int64: a change of one entry always changes it."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().view(integers).sum(dtype=torch.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Which entries of a stored weight this process holds.

    Attributes:
        rows, columns: M and N of the stored weight. A stack of experts [experts, m, n] has experts * m rows.
        start, stop: positions of the local entries; equal where there are none.
        boundaries: positions at which shards begin, inside the weight or not; empty where cuts lie between rows.
        ranks: the processes that share the weight; None for a whole weight.
    """

    rows: int
    columns: int
    start: int
    stop: int
    boundaries: tuple[int, ...] = ()
    ranks: Ranks | None = None

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Shard:
        """The shard that holds every entry of a weight of this shape."""
        entries, columns = math.prod(shape), shape[-1] if len(shape) > 1 else 1
        return cls(rows=entries // columns if columns else 0, columns=columns, start=0, stop=entries)

    @cached_property
    def is_whole(self) -> bool:
        """Whether this process holds the whole weight."""
        return self.ranks is None

    @property
    def first(self) -> int:
        """The first row with a local entry."""
        return self.start // self.columns

    @cached_property
    def local_rows(self) -> int:
        """Number of rows with a local entry."""
        return 0 if self.start == self.stop else -(-self.stop // self.columns) - self.first

    @property
    def owned(self) -> slice:
        """The local rows whose first entry is local, so that exactly one process owns a row."""
        return slice(1 if self.start % self.columns and self.local_rows else 0, self.local_rows)

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Rows of the whole weight that lie on several processes, in rising order."""
        inside = (b for b in self.boundaries if 0 < b < self.rows * self.columns and b % self.columns)
        return tuple(sorted({b // self.columns for b in inside}))

    @property
    def is_ragged(self) -> bool:
        """Whether the first or the last local row lies partly on another process."""
        return bool(self.start % self.columns or self.stop % self.columns)

    def rows_of(self, flat: Tensor) -> Tensor:
        """The local rows [local rows, N] from local entries ``flat`` [stop - start].

        A view, or where ``is_ragged`` a copy with zeros in place of entries of other processes.
        """
        if not self.is_ragged:
            return flat.view(self.local_rows, self.columns)
        padded = flat.new_zeros(self.local_rows * self.columns)
        self._local_entries(padded).copy_(flat)
        return padded.view(self.local_rows, self.columns)

    def write(self, flat: Tensor, rows: Tensor) -> None:
        """Copy the local entries of ``rows`` to ``flat``; nothing to do where ``rows_of`` returned a view."""
        if self.is_ragged:
            flat.copy_(self._local_entries(rows.view(-1)))

    def _local_entries(self, padded: Tensor) -> Tensor:
        """A view of the local entries in whole local rows, [local rows * N]."""
        before = self.start - self.first * self.columns
        return padded.narrow(0, before, self.stop - self.start)

    def local_cuts(self) -> list[tuple[int, int]]:
        """The cut rows with local entries, as pairs (index in ``cuts``, local row)."""
        local = range(self.first, self.first + self.local_rows)
        return [(i, row - self.first) for i, row in enumerate(self.cuts) if row in local]


def completed_cut_rows(shards: Sequence[Shard], flats: Sequence[Tensor]) -> list[dict[int, Tensor]]:
    """The complete entries of rows that lie on several processes, by one all-reduce for all weights.

    Args:
        shards: of cut weights that share one group of processes; the same weights in the same order on every process.
        flats: the local entries of every weight.

    Returns:
        For every weight a mapping from local row to the entries of that row, [N].
    """
    ranks = shards[0].ranks
    assert ranks is not None
    sizes = [len(shard.cuts) * shard.columns for shard in shards]
    if not any(sizes):
        return [{} for _ in shards]
    buffer = flats[0].new_zeros(sum(sizes))
    parts = [part.view(-1, shard.columns) for part, shard in zip(buffer.split(sizes), shards, strict=True)]
    for shard, flat, part in zip(shards, flats, parts, strict=True):
        for cut, row in shard.local_cuts():
            begin = (shard.first + row) * shard.columns
            low, high = max(shard.start, begin), min(shard.stop, begin + shard.columns)
            part[cut, low - begin : high - begin] = flat[low - shard.start : high - shard.start]
    buffer = ranks.sum(buffer)
    parts = [part.view(-1, shard.columns) for part, shard in zip(buffer.split(sizes), shards, strict=True)]
    return [{row: part[cut] for cut, row in shard.local_cuts()} for shard, part in zip(shards, parts, strict=True)]
