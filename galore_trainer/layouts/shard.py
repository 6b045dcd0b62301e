"""Which entries of a weight this process holds, and sums over the processes that hold the others.

A weight is read as it is stored, row by row: M rows of N columns, entry i * N + j. A process holds the entries
``start:stop``. A whole weight is the shard that holds every row. FSDP2 cuts between rows; ZeRO cuts anywhere, so that a
row may lie on two processes or more, and a process may hold nothing. The shards of all processes are disjoint and cover
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

HOSTS_WAIT = datetime.timedelta(hours=6)  # a process that ends is noticed at once; for others NCCL has its own


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that share a weight (a ``torch.distributed`` group)."""

    group: Any

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes, in place where memory allows; all call it, in the same order."""
        return self._reduce(x, dist.ReduceOp.SUM)

    @property
    def count(self) -> int:
        """How many processes these are."""
        return dist.get_world_size(self.group)

    @cached_property
    def hosts(self) -> Ranks:
        """The same processes, for numbers that lie on the CPU: no GPU is waited for. All call it at the same time."""
        if dist.get_backend(self.group) == "gloo":
            return self
        members = None if self.group is None else dist.get_process_group_ranks(self.group)
        alone = members is not None  # other processes do not come here
        return Ranks(dist.new_group(members, HOSTS_WAIT, "gloo", use_local_synchronization=alone))

    def differing(self, x: Tensor) -> Tensor:
        """Where the processes do not all hold the same numbers, boolean."""
        return self._reduce(x.clone(), dist.ReduceOp.MIN) != self._reduce(x.clone(), dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        """All-reduce; over the accelerator where offloaded tensors meet a backend that knows accelerators alone."""
        x = x.contiguous()
        there = x
        if x.device.type == "cpu" and dist.get_backend(self.group) == "nccl":
            there = x.to(torch.device("cuda", torch.cuda.current_device()))
        dist.all_reduce(there, operation, group=self.group)
        return there.to(x.device)


def checksum(x: Tensor) -> Tensor:
    """Sum of a tensor's bits as integers, int64: any change shows, however small."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().view(integers).sum(dtype=torch.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Which entries of a stored weight this process holds.

    Attributes:
        rows, columns: M and N of the stored weight; a stack of experts [experts, m, n] has experts * m rows.
        start, stop: the entries of this process; equal where it has none.
        boundaries: first entries of all processes' shards.
        ranks: the processes that hold the others; None for a whole weight.
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
        """Whether this process holds the weight by itself."""
        return self.ranks is None

    @property
    def first(self) -> int:
        """The first row that this process holds any entry of."""
        return self.start // self.columns

    @cached_property
    def local_rows(self) -> int:
        """How many rows this process holds any entry of."""
        return 0 if self.start == self.stop else -(-self.stop // self.columns) - self.first

    @property
    def owned(self) -> slice:
        """Of the local rows, those whose first entry lies here: every row of the weight is owned by one process."""
        return slice(1 if self.start % self.columns and self.local_rows else 0, self.local_rows)

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """The rows, counted in the whole weight, that lie on more than one process."""
        inside = (b for b in self.boundaries if 0 < b < self.rows * self.columns and b % self.columns)
        return tuple(sorted({b // self.columns for b in inside}))

    @property
    def is_ragged(self) -> bool:
        """Whether the first or the last local row lies on another process too."""
        return bool(self.start % self.columns or self.stop % self.columns)

    def rows_of(self, flat: Tensor) -> Tensor:
        """[local rows, N] of ``flat`` [stop - start]: a view, or a copy with zeros beside cut rows."""
        if not self.is_ragged:
            return flat.view(self.local_rows, self.columns)
        whole = flat.new_zeros(self.local_rows * self.columns)
        self._own(whole).copy_(flat)
        return whole.view(self.local_rows, self.columns)

    def write(self, flat: Tensor, rows: Tensor) -> None:
        """Copy the entries of this process back from ``rows``; nothing to do where ``rows_of`` gave a view."""
        if self.is_ragged:
            flat.copy_(self._own(rows.view(-1)))

    def _own(self, whole: Tensor) -> Tensor:
        before = self.start - self.first * self.columns
        return whole.narrow(0, before, self.stop - self.start)

    def local_cuts(self) -> list[tuple[int, int]]:
        """Cut rows that this process has a part of: (place among ``cuts``, local row)."""
        here = range(self.first, self.first + self.local_rows)
        return [(i, row - self.first) for i, row in enumerate(self.cuts) if row in here]


def completed_cut_rows(shards: Sequence[Shard], flats: Sequence[Tensor]) -> list[dict[int, Tensor]]:
    """The rows that lie on several processes, complete: one sum over the processes for all weights together.

    Args:
        shards: of cut weights of one group of processes; the same weights on each process, in the same order.
        flats: this process's entries of each.

    Returns:
        For each weight a mapping from local row to the row's entries [N].
    """
    ranks = shards[0].ranks
    assert ranks is not None
    sizes = [len(shard.cuts) * shard.columns for shard in shards]
    if not any(sizes):
        return [{} for _ in shards]
    buffer = flats[0].new_zeros(sum(sizes))
    parts = [part.view(-1, shard.columns) for part, shard in zip(buffer.split(sizes), shards, strict=True)]
    for shard, flat, part in zip(shards, flats, parts, strict=True):
        for place, row in shard.local_cuts():
            begin = (shard.first + row) * shard.columns
            low, high = max(shard.start, begin), min(shard.stop, begin + shard.columns)
            part[place, low - begin : high - begin] = flat[low - shard.start : high - shard.start]
    buffer = ranks.sum(buffer)
    parts = [part.view(-1, shard.columns) for part, shard in zip(buffer.split(sizes), shards, strict=True)]
    return [{row: part[place] for place, row in shard.local_cuts()} for shard, part in zip(shards, parts, strict=True)]
