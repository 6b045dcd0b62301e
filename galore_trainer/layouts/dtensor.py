"""FSDP2: parameters are DTensors, cut between rows along their first dimension."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from galore_trainer.layouts.shard import Ranks, Shard


def is_dtensor(p: Any) -> bool:
    """Whether a tensor is one of several processes' shards."""
    return isinstance(p, DTensor)


def local(x: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def shard_of(p: DTensor, name: str) -> Shard:
    """Where this process's rows of a DTensor lie.

    Raises:
        ValueError: it is cut along another dimension, or along its first one more than once.
    """
    dims = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    if len(dims) != 1 or p.placements[dims[0]] != ShardPlacement(0):
        raise ValueError(f"{name} is placed {p.placements}: only weights cut along their first dimension, once")
    columns = p.shape[-1] if p.dim() > 1 else 1
    rows = p.numel() // columns if columns else 0
    each = math.prod(p.shape[1:])  # entries of one index of the first dimension
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    start = offset[0] * each if math.prod(shape) else 0
    return Shard(
        rows=rows, columns=columns, start=start, stop=start + math.prod(shape), boundaries=(),
        ranks=Ranks(p.device_mesh.get_group(dims[0])),
    )  # fmt: skip


def like(value: Tensor, p: DTensor) -> DTensor:
    """A DTensor of what every process keeps beside its part of ``p``, cut as ``p`` is.

    Args:
        value: this process's part: a row for each of its rows of ``p``, or (one dimension) a number for each entry.
        p: the parameter.
    """
    part = p.to_local()
    if value.dim() == 1:
        value = value.view(part.shape)
        return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
    shape = (*p.shape[:-1], *value.shape[1:])
    stacked = value.view(part.shape[0], *shape[1:])
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        stacked, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
