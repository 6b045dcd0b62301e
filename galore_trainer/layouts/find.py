"""Where the weights of an optimizer's groups lie: whole, as rows of DTensors, or inside DeepSpeed's flat tensors.

accelerate replaces parameters after the optimizer is built (FSDP2 puts DTensors in their place, ZeRO one flat tensor a
group), so every step asks again. Answers are cached for as long as a tensor lives.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.layouts.dtensor import shard_of
from galore_trainer.layouts.shard import Shard
from galore_trainer.layouts.zero import Slice, flats_of, is_zero, slices_of

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
Group = Mapping[str, Any]


def address_of(p: Tensor) -> int:
    """Where a parameter lies in memory; 0 for tensors that stand for others (DTensors, fake ones)."""
    return p.data_ptr() if type(p) in PLAIN_TYPES else 0


class Noted:
    """The parameters of a group as they were when the group was added, or when they were last checked.

    Attributes:
        originals: weak references to the parameters that the group began with.
        shapes, dtypes, addresses: of each parameter; an address is 0 where a tensor has none.
        by_size: positions in the group, large shapes first, equal shapes in their order.
        projected: whether the group is projected.
    """

    def __init__(self, params: Sequence[Tensor], *, projected: bool = False) -> None:
        self.projected = projected
        self.originals = [weakref.ref(p) for p in params]
        self.shapes = [torch.Size(getattr(p, "ds_shape", p.shape)) for p in params]
        self.dtypes = [p.dtype for p in params]
        self.addresses = [address_of(p) for p in params]
        self.shards = [Shard.whole(shape) for shape in self.shapes]
        sizes = [(shape.numel(), tuple(shape)) for shape in self.shapes]
        self.by_size = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)

    def note(self, i: int, p: Tensor) -> None:
        """Remember parameter ``i`` as it is now."""
        self.shapes[i], self.dtypes[i], self.addresses[i] = p.shape, p.dtype, address_of(p)
        self.shards[i] = Shard.whole(p.shape)


class Placement:
    """Finds the shards of an optimizer's weights; it holds no optimizer, groups are passed in."""

    def __init__(self) -> None:
        self._noted: dict[str, Noted] = {}
        self._shards: dict[int, tuple[weakref.ref[Tensor], Shard]] = {}
        self._slices: dict[int, tuple[weakref.ref[Tensor], Noted, list[Slice]]] = {}

    def note(self, group: Group) -> None:
        """Remember the parameters that a new group began with; ZeRO keeps what it knows of its slices on them."""
        self._noted[_key(group)] = Noted(group["params"], projected=group["projected"])

    def noted(self, group: Group) -> Noted | None:
        """What was noted of a group; None for a group that was never noted."""
        return self._noted.get(_key(group))

    def originals(self, group: Group) -> list[Any]:
        """The parameters that a group began with; None where one is gone."""
        return [ref() for ref in self._known(group).originals]

    def shapes(self, group: Group) -> list[torch.Size]:
        """The whole shapes of a group's weights, however they are cut."""
        return self._known(group).shapes

    def is_flat(self, group: Group) -> bool:
        """Whether DeepSpeed has put flat tensors in the place of a group's parameters."""
        originals = self._known(group).originals
        return bool(originals) and is_zero(originals[0]())

    @property
    def is_cut(self) -> bool:
        """Whether any shard of a cut weight was asked for so far."""
        return bool(self._shards or self._slices)

    def shard(self, p: Any, name: str) -> Shard:
        """Which rows of a DTensor this process holds.

        Raises:
            ValueError: it is not cut between its rows, once.
        """
        known = self._shards.get(id(p))
        if known is None or known[0]() is not p:
            known = self._shards[id(p)] = weakref.ref(p), shard_of(p, name)
        return known[1]

    def slices(self, group: Group, flat: Tensor) -> list[Slice]:
        """The weights inside a flat tensor of a group, on every process the same ones in the same order."""
        known = self._slices.get(id(flat))
        if known is None or known[0]() is not flat:
            noted = self._known(group)
            slices = slices_of(flat, self.originals(group), noted.shapes)
            known = self._slices[id(flat)] = weakref.ref(flat), noted, slices
        return known[2]

    def flats(self, group: Group) -> list[Tensor]:
        """The flat tensors of a group, in DeepSpeed's order, before the first step and between steps too."""
        return flats_of(group["params"], self.originals(group))

    def stepped_flats(self, group: Group) -> list[Tensor]:
        """The flat tensors of a group that steps have seen: between steps ZeRO-3 leaves its groups empty."""
        noted = self._known(group)
        return [flat for ref, owner, _ in self._slices.values() if owner is noted and (flat := ref()) is not None]

    def _known(self, group: Group) -> Noted:
        return self._noted[_key(group)]


def _key(group: Group) -> str:
    """What tells a group from others. DeepSpeed hides other groups in a step, and a load replaces the mapping."""
    return next(iter(group.get("names", ())), "")
