"""Equal matrices side by side: what the optimizer updates in one go.

A job is one logical matrix with its gradient and state. Jobs whose matrices have equal shapes, sides and ranks form a
stack; the core sees their blocks as one leading dimension. State stays with each parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from galore_trainer.core.galore import MatrixState
from galore_trainer.core.heads import LogicalMatrix
from galore_trainer.optim.parts import Part

STATE_KEYS = ("basis", "exp_avg", "exp_avg_sq", "step")


@dataclasses.dataclass(frozen=True)
class Job:
    """One logical matrix in one step.

    Attributes:
        parameter, grad: the stored weight and its gradient.
        name: logical name, with ``.q`` and the like for a part of a fused weight.
        matrix: where it lies and how it is projected.
        state: the parameter's state; keys of this matrix begin with ``prefix``.
        group: the parameter's group.
        part: what layer-wise mode kept of the gradient; None where ``grad`` is whole.
        last: whether this is the parameter's last part.
        grad_ok: 1.0 if the whole gradient of a fused weight is finite (a scalar tensor), None for a weight of one part.
    """

    parameter: Tensor
    grad: Tensor
    name: str
    matrix: LogicalMatrix
    state: dict[str, Any]
    group: dict[str, Any]
    part: Part | None = None
    last: bool = True
    grad_ok: Tensor | None = None

    @property
    def prefix(self) -> str:
        """What this matrix's keys in the state begin with."""
        return f"{self.matrix.label}." if self.matrix.label else ""

    def key(self) -> tuple[Any, ...]:
        """Equal for jobs that one stack may hold."""
        m, s = self.matrix, self.state
        shape = (m.blocks, m.block_rows, m.columns, m.side, m.rank, m.head_dim, m.lenders)
        phase = (self.part is None, self.grad_ok is None, s["refreshes"] > 0, s["calls"] - s["born"], s["refreshes"])
        dtype = (self.parameter.dtype, self.grad.dtype, self.parameter.device)
        return (id(self.group), *shape, *phase, *dtype)


class Stack:
    """Jobs of one shape; tensors of all of them are joined along the first dimension, blocks."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.matrix, self.group = jobs[0].matrix, jobs[0].group
        self.device = jobs[0].parameter.device

    def gradients(self) -> Tensor | None:
        """[jobs x blocks, rows, n]: a view for a single job, else a copy; None where they were not kept whole."""
        if self.jobs[0].part is not None:
            return None
        return _join([job.matrix.take(job.grad) for job in self.jobs])

    def kept(self, what: str) -> Tensor:
        """What layer-wise mode kept of the gradients: an attribute of ``Part`` of every job, joined."""
        return _join([getattr(job.part, what) for job in self.jobs])

    def get(self, key: str) -> Tensor:
        """A state tensor [blocks, ...] of every job, joined."""
        return _join([job.state[job.prefix + key] for job in self.jobs])

    def put(self, key: str, value: Tensor) -> None:
        """Hand each job its part of [jobs x blocks, ...]."""
        for job, part in zip(self.jobs, self.split(value), strict=True):
            job.state[job.prefix + key] = part

    def pop(self, key: str) -> Tensor:
        """``get``, and remove it."""
        value = self.get(key)
        for job in self.jobs:
            del job.state[job.prefix + key]
        return value

    def has(self, key: str) -> bool:
        """Whether the state holds this key; equal for all jobs of a stack."""
        return self.jobs[0].prefix + key in self.jobs[0].state

    def get_count(self, key: str) -> Tensor:
        """A scalar state tensor of every job, as [jobs x blocks, 1, 1]."""
        return self.spread(torch.stack([job.state[job.prefix + key] for job in self.jobs]))

    def put_count(self, key: str, value: Tensor) -> None:
        """Undo ``get_count``."""
        for job, part in zip(self.jobs, value.view(-1)[:: self.matrix.blocks].unbind(), strict=True):
            job.state[job.prefix + key] = part

    def read(self) -> MatrixState:
        """Basis, moments and their age."""
        P, M, V = (self.get(key) for key in STATE_KEYS[:3])
        return MatrixState(P, M, V, self.get_count(STATE_KEYS[3]))

    def write(self, new: MatrixState) -> None:
        """Undo ``read``."""
        self.put(STATE_KEYS[0], new.P)
        self.write_moments(new)

    def write_moments(self, new: MatrixState) -> None:
        """``write`` but for the basis, which an ordinary step leaves as it is."""
        self.put(STATE_KEYS[1], new.M)
        self.put(STATE_KEYS[2], new.V)
        self.put_count(STATE_KEYS[3], new.t)

    def spread(self, by_job: Tensor) -> Tensor:
        """[jobs] to [jobs x blocks, 1, 1]."""
        return by_job.repeat_interleave(self.matrix.blocks).view(-1, 1, 1)

    def split(self, value: Tensor) -> Iterable[Tensor]:
        """[jobs x blocks, ...] into one tensor a job."""
        return (value,) if len(self.jobs) == 1 else value.split(self.matrix.blocks)


def make_stacks(jobs: Iterable[Job], max_elements: int) -> Iterator[Stack]:
    """Stacks of equal jobs, in the order of their first jobs, each of at most ``max_elements`` gradient entries."""
    by_key: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        by_key.setdefault(job.key(), []).append(job)
    for members in by_key.values():
        size = max(1, max_elements // (members[0].matrix.rows * members[0].matrix.columns))
        for start in range(0, len(members), size):
            yield Stack(members[start : start + size])


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
