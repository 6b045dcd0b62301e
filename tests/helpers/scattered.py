"""Matrices in every form of storage, and what the kernels take of them, for the tests of the kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.kernels.tables import Layout, Scattered, alignment_of, packed, upload

BOUND = 4e-6
JOBS = 3

PLAIN = LogicalMatrix(length=70, columns=37, rank=5)
WIDE = LogicalMatrix(length=37, columns=150, rank=16, side="left")
TALL = LogicalMatrix(length=300, columns=48, rank=24)
DEEP = LogicalMatrix(length=30, columns=150, rank=140)  # several steps along columns, and along the rank
HIGH = LogicalMatrix(length=80, columns=30, rank=70, side="left")
HEADS = LogicalMatrix(length=40, columns=36, rank=6, blocks=5, head_dim=8, lenders=1)
EXPERTS = LogicalMatrix(outer=3, length=20, columns=33, rank=7, side="left", blocks=3)
FUSED = LogicalMatrix(label="k", start=24, length=16, columns=40, rank=9)  # rows 24:40 of 56
CONV1D = LogicalMatrix(label="v", start=24, length=12, columns=30, rank=3, transposed=True)
INTERLEAVED = LogicalMatrix(label="q", outer=4, start=3, length=5, columns=28, rank=4, side="left")  # of [4, 9, n]
STORED = {"FUSED": (56, 40), "CONV1D": (30, 40), "INTERLEAVED": (36, 28), "EXPERTS": (3, 20, 33)}
MATRICES = {
    "PLAIN": PLAIN,
    "WIDE": WIDE,
    "TALL": TALL,
    "DEEP": DEEP,
    "HIGH": HIGH,
    "HEADS": HEADS,
    "EXPERTS": EXPERTS,
    "FUSED": FUSED,
    "CONV1D": CONV1D,
    "INTERLEAVED": INTERLEAVED,
}
every_matrix = pytest.mark.parametrize("name", MATRICES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def random(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def stored(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """What the optimizer holds: one tensor for each job, each anywhere."""
    matrix = MATRICES[name]
    shape = STORED.get(name, (matrix.rows, matrix.columns))
    return [random(device, *shape, seed=seed + i).to(dtype) for i in range(JOBS)]


def places(tensors: list[Tensor], matrix: LogicalMatrix | None = None) -> Scattered:
    views = tensors if matrix is None else [matrix.rows_of(x) for x in tensors]
    addresses = [x.data_ptr() for x in views]
    return Scattered(upload([addresses], tensors[0].device)[0], tensors[0].dtype, alignment_of(addresses))


def layout(name: str, tensors: list[Tensor]) -> Layout:
    return Layout.of(MATRICES[name].rows_of(tensors[0]))


def blocks_of(name: str, tensors: list[Tensor]) -> Tensor:
    return torch.cat([MATRICES[name].take(x) for x in tensors])


def basis(name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    blocks, length, rank = MATRICES[name].basis_shape
    return torch.linalg.qr(random(device, JOBS * blocks, length, rank, seed=50)).Q.contiguous().to(dtype)


def moment(name: str, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 60) -> Tensor:
    blocks, *shape = MATRICES[name].moment_shape
    return random(device, JOBS * blocks, *shape, seed=seed).to(dtype)


def flags(device: torch.device, *values: float) -> Tensor:
    return torch.tensor(values or [1.0] * JOBS, device=device)


def spread(ok: Tensor, blocks: int) -> Tensor:
    return ok.repeat_interleave(blocks).view(-1, 1, 1)


def lifted(name: str, N: Tensor, P: Tensor) -> Tensor:
    N, P = N.double(), P.double()
    return N @ P.mT if MATRICES[name].side == "right" else P @ N


def keys_of(device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << 62, (JOBS,), generator=generator).to(device)


def rates(device: torch.device, step: float, decay: float = 0.0, count: int = JOBS) -> Tensor:
    """A table of equal rates."""
    return torch.tensor([packed(step, decay)] * count, device=device)
