"""Threads that stand for processes: they add up where they meet."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from galore_trainer.layouts.shard import Ranks


class Meeting:
    """Where the threads of one group meet."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=60)
        self.brought: list[Any] = [None] * world


class Thread(Ranks):
    """One of them."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(id(meeting))
        object.__setattr__(self, "meeting", meeting)
        object.__setattr__(self, "rank", rank)

    @property
    def count(self) -> int:
        return len(self.meeting.brought)

    @property
    def hosts(self) -> Thread:  # type: ignore[override]
        return self

    def gather(self, x: Tensor) -> Tensor:
        self.meeting.brought[self.rank] = x.clone()
        self.meeting.barrier.wait()
        found = torch.stack(self.meeting.brought)
        self.meeting.barrier.wait()
        return found

    def sum(self, x: Tensor) -> Tensor:
        return self.gather(x).sum(dim=0)

    def differing(self, x: Tensor) -> Tensor:
        return (self.gather(x) != x).any(dim=0)
