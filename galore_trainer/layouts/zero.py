"""DeepSpeed ZeRO: the weights of a group are one flat tensor, of which every process holds a slice.

DeepSpeed has no public interface for the places of weights in flat tensors. The attributes that are read here are those
of DeepSpeed 0.19; ``_check`` compares every slice with its weight before the slice is used.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from galore_trainer.layouts.shard import Ranks, Shard


@dataclasses.dataclass(frozen=True)
class Slice:
    """The part of a weight inside a flat tensor.

    Attributes:
        index: position of the weight in its group.
        shard: the entries of the weight that lie in the flat tensor.
        offset: position of the first of them in the flat tensor.
        dtype: of the weight in the model; the flat tensor is float32.
    """

    index: int
    shard: Shard
    offset: int
    dtype: torch.dtype

    def of(self, flat: Tensor) -> Tensor:
        """The entries of this weight in a flat tensor, a view."""
        return flat.narrow(0, self.offset, self.shard.stop - self.shard.start)


def is_zero(original: Any) -> bool:
    """Whether DeepSpeed manages a parameter; False for None, a parameter that no longer exists."""
    return original is not None and (hasattr(original, "_z3_optimizer") or hasattr(original, "_dp_group"))


def flats_of(params: Sequence[Tensor], originals: Sequence[Any]) -> list[Tensor]:
    """The flat tensors of a group, in DeepSpeed's order.

    Args:
        params: ``params`` of the optimizer's group; ZeRO-3 empties it between steps.
        originals: the parameters of the model that belong to the group.
    """
    if not hasattr(originals[0], "_z3_optimizer"):
        return list(params)
    engine = originals[0]._z3_optimizer
    sub_groups = sorted({engine.grad_position[engine.get_param_id(p)][0] for p in originals})
    return [engine.fp32_partitioned_groups_flat[i] for i in sub_groups]


def slices_of(flat: Tensor, originals: Sequence[Any], shapes: Sequence[Sequence[int]]) -> list[Slice]:
    """The weights in a flat tensor: the same weights in the same order on every process.

    Args:
        flat: a flat tensor of the group, float32.
        originals: the parameters of the model that belong to the group.
        shapes: the shapes of the whole weights.

    Raises:
        RuntimeError: the places that DeepSpeed states do not fit the weights.
    """
    slices = []
    for index, (p, shape) in enumerate(zip(originals, shapes, strict=True)):
        columns = shape[-1]
        rows = torch.Size(shape).numel() // columns
        place = _stage3(flat, p, rows, columns) if hasattr(p, "_z3_optimizer") else _stage12(flat, p, rows, columns)
        if place is not None:
            slices.append(Slice(index, *place, p.dtype))
    for part in slices:
        _check(part, flat, originals[part.index])
    return slices


def _stage12(flat: Tensor, p: Any, rows: int, columns: int) -> tuple[Shard, int]:
    """Shard and offset under stages 1 and 2: weights are views of one buffer, which is cut into equal partitions."""
    group, size = p._dp_group, flat.numel()
    world, low = dist.get_world_size(group), dist.get_rank(group) * size
    begin, numel = p.data.storage_offset(), rows * columns
    start, stop = max(begin, low) - begin, min(begin + numel, low + size) - begin
    if stop <= start:
        start = stop = 0
    boundaries = tuple(rank * size - begin for rank in range(1, world))
    shard = Shard(rows=rows, columns=columns, start=start, stop=stop, boundaries=boundaries, ranks=Ranks(group))
    return shard, begin + start - low if stop > start else 0


def _stage3(flat: Tensor, p: Any, rows: int, columns: int) -> tuple[Shard, int] | None:
    """Shard and offset under stage 3, which cuts every weight into equal partitions.

    Returns:
        None where the weight lies in the flat tensor of another sub-group.
    """
    engine = p._z3_optimizer
    sub_group, offset, _ = engine.grad_position[engine.get_param_id(p)]
    if engine.fp32_partitioned_groups_flat[sub_group] is not flat:
        return None
    group, size = p.ds_process_group, p.partition_numel()
    start = min(dist.get_rank(group) * size, p.ds_numel)
    stop = min(start + size, p.ds_numel)
    boundaries = tuple(rank * size for rank in range(1, dist.get_world_size(group)))
    shard = Shard(rows=rows, columns=columns, start=start, stop=stop, boundaries=boundaries, ranks=Ranks(group))
    return shard, int(offset) if stop > start else 0


def _check(part: Slice, flat: Tensor, p: Any) -> None:
    """Raise RuntimeError where a slice holds other numbers than its weight ``p``."""
    shard = part.shard
    size = shard.stop - shard.start
    if part.offset < 0 or part.offset + size > flat.numel():
        raise _unknown_places(f"entries {part.offset}:{part.offset + size} of a tensor of {flat.numel()}")
    if not size:
        return
    stored = p.ds_tensor if hasattr(p, "ds_tensor") else p.data.reshape(-1)[shard.start : shard.stop]
    expected = stored.detach().reshape(-1)[:size].to(device=flat.device)
    if expected.numel() < size:
        return  # the weight is offloaded to disk
    actual = part.of(flat).to(expected.dtype)
    eps = torch.finfo(expected.dtype).eps
    if not torch.allclose(actual.float(), expected.float(), rtol=2 * eps, atol=1e-30):
        raise _unknown_places(f"weight {part.index} of a group: its slice holds other numbers than the weight")


def _unknown_places(what: str) -> RuntimeError:
    version = importlib.metadata.version("deepspeed")
    return RuntimeError(
        f"DeepSpeed {version} keeps its slices in an unknown way: {what}. Use a version this project was tested with "
        "(0.19.8), another ZeRO stage, FSDP2 or DDP."
    )
