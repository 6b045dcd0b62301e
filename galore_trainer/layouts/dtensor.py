"""FSDP2: parameters are DTensors, sharded along their first dimension."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from galore_trainer.layouts.shard import Ranks, Shard

TYPE = DTensor


def local(x: DTensor) -> Tensor:
    """This process's part of a DTensor."""
    return x.to_local()


def shard_of(p: DTensor, name: str) -> Shard:
    """The entries of a DTensor that this process holds.

    Args:
        p: a weight of an FSDP2 model.
        name: of the weight, for the error.

    Raises:
        ValueError: ``p`` is sharded along another dimension, or over more than one dimension of its mesh.
    """
    dims = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    if len(dims) != 1 or p.placements[dims[0]] != ShardPlacement(0):
        raise ValueError(f"{name} is placed {p.placements}: only weights cut along their first dimension, once")
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    entries = math.prod(shape)
    start = offset[0] * math.prod(p.shape[1:]) if entries else 0
    ranks = Ranks(p.device_mesh.get_group(dims[0]))
    return dataclasses.replace(Shard.whole(p.shape), start=start, stop=start + entries, ranks=ranks)


def like(value: Tensor, p: DTensor) -> DTensor:
    """State of a parameter as a DTensor with the placements of the parameter.

    Args:
        value: the local part: [local rows, k], or [local entries].
        p: the parameter.

    Returns:
        Shape of ``p``, or with k columns in place of those of ``p``.
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
