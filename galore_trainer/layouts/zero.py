"""DeepSpeed ZeRO: a group's weights are one flat tensor, of which every process holds a slice.

Which entries of which weight lie where is nobody's public interface. What is read here was right in DeepSpeed 0.19, and
``check`` compares it with the weights themselves before it is trusted.
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
    """A weight's part of a flat tensor: its entries ``shard.start:stop`` lie at ``offset``; the model's dtype of it."""

    index: int
    shard: Shard
    offset: int
    dtype: torch.dtype

    def of(self, flat: Tensor) -> Tensor:
        """This weight's entries of a flat tensor, a view."""
        return flat.narrow(0, self.offset, self.shard.stop - self.shard.start)


def is_zero(original: Any) -> bool:
    """Whether DeepSpeed has taken a parameter over."""
    return original is not None and (hasattr(original, "_z3_optimizer") or hasattr(original, "_dp_group"))


def flats_of(params: Sequence[Tensor], originals: Sequence[Any]) -> list[Tensor]:
    """The flat tensors of a group, in DeepSpeed's order; between steps ZeRO-3 keeps them out of the group.

    Args:
        params: what stands in the optimizer's group.
        originals: the model's parameters of that group.
    """
    if not hasattr(originals[0], "_z3_optimizer"):
        return list(params)
    engine = originals[0]._z3_optimizer
    sub_groups = sorted({engine.grad_position[engine.get_param_id(p)][0] for p in originals})
    return [engine.fp32_partitioned_groups_flat[i] for i in sub_groups]


def slices_of(flat: Tensor, originals: Sequence[Any], shapes: Sequence[Sequence[int]]) -> list[Slice]:
    """The weights in a flat tensor, on every process the same ones in the same order.

    Args:
        flat: what stands in the optimizer's group, float32.
        originals: the model's parameters of that group.
        shapes: their whole shapes.

    Raises:
        RuntimeError: what DeepSpeed keeps about its slices does not agree with the weights.
    """
    found = []
    for index, (p, shape) in enumerate(zip(originals, shapes, strict=True)):
        columns = shape[-1]
        rows = torch.Size(shape).numel() // columns
        piece = _stage3(flat, p, rows, columns) if hasattr(p, "_z3_optimizer") else _stage12(flat, p, rows, columns)
        if piece is not None:
            found.append(Slice(index, *piece, p.dtype))
    for each in found:
        _check(each, flat, originals[each.index])
    return found


def _stage12(flat: Tensor, p: Any, rows: int, columns: int) -> tuple[Shard, int]:
    """Stages 1 and 2: the weight is a view of the group's flat buffer, cut into equal partitions."""
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
    """Stage 3: every weight is cut into equal partitions of its own; None if it lies in another sub-group's tensor."""
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


def _check(piece: Slice, flat: Tensor, p: Any) -> None:
    """Compare a slice with the weight it is said to be."""
    shard = piece.shard
    size = shard.stop - shard.start
    if piece.offset < 0 or piece.offset + size > flat.numel():
        raise _disagree(f"entries {piece.offset}:{piece.offset + size} of a tensor of {flat.numel()}")
    if not size:
        return
    stored = p.ds_tensor if hasattr(p, "ds_tensor") else p.data.reshape(-1)[shard.start : shard.stop]
    expected = stored.detach().reshape(-1)[:size].to(device=flat.device)
    if expected.numel() < size:
        return  # the weight itself lies on disk
    ours = piece.of(flat).to(expected.dtype)
    step = torch.finfo(expected.dtype).eps
    if not torch.allclose(ours.float(), expected.float(), rtol=2 * step, atol=1e-30):
        raise _disagree(f"weight {piece.index} of a group: its slice holds other numbers than the weight")


def _disagree(what: str) -> RuntimeError:
    version = importlib.metadata.version("deepspeed")
    return RuntimeError(
        f"DeepSpeed {version} keeps its slices in an unknown way: {what}. Use a version this project was tested with "
        "(0.19.8), another ZeRO stage, FSDP2 or DDP."
    )
