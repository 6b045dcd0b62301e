"""Equal matrices side by side: what the optimizer updates in one go.

A job is one logical matrix with its gradient and state. Jobs whose matrices have equal shapes, sides and ranks form a
stack; the core sees their blocks as one leading dimension. State stays with each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from galore_trainer.core.galore import MatrixState, compute_dtype
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.core.precision import NOISE, Stored, decode, decode_basis, encode, encode_basis
from galore_trainer.optim.parts import Part
from galore_trainer.optim.streams import stream

Item = TypeVar("Item")

PROJECTED = 16  # entries of a gradient that one of its projection counts for in a stack
BASIS, AGE, SCALE = "basis", "step", "_scale"
MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))  # key, and whether it has a sign


class Job(NamedTuple):
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
        factors: what kernels round the factors of products to, where that is not the dtype of weight and gradient:
            bfloat16 where a model computes in it and its optimizer adds up in float32 (ZeRO).
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
    factors: torch.dtype | None = None

    @property
    def prefix(self) -> str:
        """What this matrix's keys in the state begin with."""
        return self.matrix.prefix

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
        self.dtype = compute_dtype(jobs[0].parameter.dtype)  # of state and step

    def each_gradient(self) -> list[Tensor]:
        """[blocks, rows, n] of every job, where they lie; none where they were not kept whole."""
        return [job.matrix.take(job.grad) for job in self.jobs if job.part is None]

    def gradients(self) -> Tensor | None:
        """[jobs x blocks, rows, n]: a view for a single job, else a copy; None where they were not kept whole."""
        each = self.each_gradient()
        return _join(each) if each else None

    def kept(self, what: str) -> Tensor:
        """What layer-wise mode kept of the gradients: an attribute of ``Part`` of every job, joined and scaled."""
        parts: list[Any] = [job.part for job in self.jobs]
        factor = parts[0].factor
        if any(part.factor is not factor for part in parts):
            for part in parts:
                part.settle_factor()
            factor = None
        joined = _join([getattr(part, what) for part in parts])
        return joined if factor is None else joined * factor

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

    def addresses(self, keys: Sequence[str]) -> dict[str, list[int]]:
        """Where state tensors of every job begin, by key; contiguous: what is written there stays in the state."""
        found: dict[str, list[int]] = {key: [] for key in keys}
        for job in self.jobs:
            state, prefix = job.state, job.matrix.prefix
            for key, column in found.items():
                value = state[prefix + key]
                if not value.is_contiguous():
                    value = state[prefix + key] = value.contiguous()
                column.append(value.data_ptr())
        return found

    def get_count(self, key: str) -> Tensor:
        """A scalar state tensor of every job, as [jobs x blocks, 1, 1]."""
        return self.spread(torch.stack([job.state[job.prefix + key] for job in self.jobs]))

    def put_count(self, key: str, value: Tensor) -> None:
        """Undo ``get_count``."""
        for job, part in zip(self.jobs, value.view(-1)[:: self.matrix.blocks].unbind(), strict=True):
            job.state[job.prefix + key] = part

    def get_moment(self, key: str, *, signed: bool) -> Tensor:
        """A moment of every job, joined, in the stack's dtype."""
        return decode(self._stored(key), signed=signed).to(self.dtype)

    def put_moment(self, key: str, value: Tensor, *, signed: bool, ok: Tensor | None = None, purpose: str = "") -> None:
        """Store a moment in as many bits as the group says.

        Args:
            key: of the state.
            value: [jobs x blocks, ...], in the stack's dtype.
            signed: as in ``encode``.
            ok: [jobs x blocks, 1, 1], 0.0 where what is stored shall stay, bit for bit; None changes all.
            purpose: tells random streams apart where a key is stored twice in a step.
        """
        bits = self.group["galore"]["state_bits"]
        if bits == 32:
            self.put(key, value)
            return
        new = encode(value, bits, self._noise(key + purpose, value), signed=signed)
        if ok is not None:
            values, scale = self._stored(key)
            new = Stored(
                torch.where(ok > 0.0, new.values, values),
                None if scale is None or new.scale is None else torch.where(ok[:, 0] > 0.0, new.scale, scale),
            )
        self._store(key, new)

    def put_basis(self, P: Tensor) -> Tensor:
        """Store bases in as many bits as the group says; what was stored, in the stack's dtype.

        Contiguous: products round by the strides of their factors, and not every checkpoint keeps strides.
        """
        stored = encode_basis(P.contiguous(), self.group["galore"]["basis_bits"])
        self._store(BASIS, stored)
        return decode_basis(stored).to(self.dtype)

    def get_basis(self) -> Tensor:
        """The bases in the stack's dtype."""
        return decode_basis(self._stored(BASIS)).to(self.dtype)

    def read(self) -> MatrixState:
        """Basis, moments and their age."""
        M, V = (self.get_moment(key, signed=signed) for key, signed in MOMENTS)
        return MatrixState(self.get_basis(), M, V, self.get_count(AGE))

    def write_moments(self, new: MatrixState, purpose: str = "", ok: Tensor | None = None) -> None:
        """Undo ``read`` but for the basis; see ``put_moment``."""
        for (key, signed), value in zip(MOMENTS, (new.M, new.V), strict=True):
            self.put_moment(key, value, signed=signed, ok=ok, purpose=purpose)
        self.put_count(AGE, new.t)

    def create(self) -> None:
        """The state of matrices that have seen nothing: zeros."""
        jobs, matrix = len(self.jobs), self.matrix
        P, R = (
            torch.zeros(jobs * n, *rest, dtype=self.dtype, device=self.device)
            for n, *rest in (matrix.basis_shape, matrix.moment_shape)
        )
        self.put_basis(P)
        self.write_moments(MatrixState(P, R, R.clone(), self.ages(jobs)))

    def ages(self, jobs: int) -> Tensor:
        """The age 0 of so many matrices, as ``get_count`` gives it."""
        return torch.zeros(jobs * self.matrix.blocks, 1, 1, dtype=torch.float32, device=self.device)

    def _stored(self, key: str) -> Stored:
        return Stored(self.get(key), self.get(key + SCALE) if self.has(key + SCALE) else None)

    def _store(self, key: str, stored: Stored) -> None:
        self.put(key, stored.values)
        if stored.scale is not None:
            self.put(key + SCALE, stored.scale)

    def _noise(self, key: str, value: Tensor) -> Tensor:
        """Rounding noise in the shape of ``value``, drawn for each job by itself."""
        seed, shape = self.group["galore"]["seed"], (self.matrix.blocks, *value.shape[1:])
        draws = (stream(self.device, seed, job.name, key, job.state["calls"]) for job in self.jobs)
        return _join(
            [torch.randint(0, NOISE, shape, generator=g, device=self.device, dtype=torch.int32) for g in draws]
        )

    def spread(self, by_job: Tensor) -> Tensor:
        """[jobs] to [jobs x blocks, 1, 1]."""
        return by_job.view(-1, 1).expand(-1, self.matrix.blocks).reshape(-1, 1, 1)

    def split(self, value: Tensor) -> Iterable[Tensor]:
        """[jobs x blocks, ...] into one tensor a job."""
        return (value,) if len(self.jobs) == 1 else value.split(self.matrix.blocks)


def make_stacks(
    jobs: Iterable[Job], max_elements: int, key: Callable[[Job], tuple[Any, ...]] = Job.key
) -> Iterator[Stack]:
    """Stacks of equal jobs, in the order of their first jobs, each of at most ``max_elements``, see ``entries``."""
    by_key: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        by_key.setdefault(key(job), []).append(job)
    for members in by_key.values():
        size = max(1, max_elements // entries(members[0].matrix))
        for start in range(0, len(members), size):
            yield Stack(members[start : start + size])


def entries(matrix: LogicalMatrix) -> int:
    """What a matrix counts for in a stack: its entries, or, at a high rank, what is made of its projection."""
    blocks, lines, rank = matrix.moment_shape
    return max(matrix.rows * matrix.columns, PROJECTED * blocks * lines * rank)


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def runs(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Consecutive items whose sizes add up to at most ``most``, at least one at a time."""
    run: list[Item] = []
    total = 0
    for item in items:
        if run and total + size(item) > most:
            yield run
            run, total = [], 0
        run.append(item)
        total += size(item)
    if run:
        yield run
