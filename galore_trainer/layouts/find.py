"""Where the weights of an optimizer's groups lie: whole, as rows of DTensors, or inside flat tensors of DeepSpeed.

accelerate replaces the parameters of an optimizer after it is built: FSDP2 by DTensors, ZeRO by flat tensors.
So every step asks anew. Answers are cached for as long as a tensor lives.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from galore_trainer.layouts import dtensor
from galore_trainer.layouts.shard import Shard
from galore_trainer.layouts.zero import Slice, flats_of, is_zero, slices_of

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
KINDS = {dtensor.TYPE: dtensor}
"""Types of tensors that stand for a shard of a parameter, each with the module that knows it."""
CUT_TYPES = tuple(KINDS)
Group = Mapping[str, Any]


def address_of(p: Tensor) -> int:
    """Memory address of a parameter; 0 for subclasses of Tensor, such as DTensors and fake tensors."""
    return p.data_ptr() if type(p) in PLAIN_TYPES else 0


def is_cut(p: Any) -> bool:
    """Whether a tensor stands for a shard of a parameter."""
    return isinstance(p, CUT_TYPES)


def local(x: Tensor) -> Tensor:
    """This process's entries of a tensor that ``is_cut``; any other tensor as it is."""
    return kind_of(x).local(x) if is_cut(x) else x


def like(value: Tensor, p: Tensor) -> Tensor:
    """State of a cut parameter as a tensor of its kind; see ``dtensor.like``."""
    return kind_of(p).like(value, p)


def shard_of(p: Tensor, name: str) -> Shard:
    """The entries of a cut parameter that this process holds; see ``dtensor.shard_of``."""
    return kind_of(p).shard_of(p, name)


def kind_of(p: Tensor) -> Any:
    """The module that knows a tensor that ``is_cut``."""
    return next(module for kind, module in KINDS.items() if isinstance(p, kind))


class Noted:
    """What is known of the parameters of a group since the group was added, or since they were last checked.

    Attributes:
        originals: weak references to the parameters with which the group was added.
        shapes, dtypes, addresses: of the parameters; shapes are those of whole weights, addresses ``address_of``.
        shards: the shards of whole weights of these shapes.
        by_size: positions in the group, large weights first, equal shapes side by side.
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
        """Replace what is known of parameter ``i``."""
        self.shapes[i], self.dtypes[i], self.addresses[i] = p.shape, p.dtype, address_of(p)
        self.shards[i] = Shard.whole(p.shape)


class Placement:
    """Finds the shards of an optimizer's weights.

    It holds no optimizer: the methods take its groups, which must have been passed to ``note``.
    """

    def __init__(self) -> None:
        self._noted: dict[str, Noted] = {}
        self._shards: MutableMapping[Tensor, Shard] = WeakTensorKeyDictionary()
        self._slices: MutableMapping[Tensor, tuple[Noted, list[Slice]]] = WeakTensorKeyDictionary()

    def note(self, group: Group) -> None:
        """Remember the parameters of a new group, since DeepSpeed stores the places of its slices on them."""
        self._noted[_key(group)] = Noted(group["params"], projected=group["projected"])

    def noted(self, group: Group) -> Noted | None:
        """What ``note`` remembered of a group; None for another group."""
        return self._noted.get(_key(group))

    def originals(self, group: Group) -> list[Any]:
        """The parameters with which a group was added; None for one that no longer exists."""
        return [ref() for ref in self._known(group).originals]

    def shapes(self, group: Group) -> list[torch.Size]:
        """Shapes of a group's whole weights, on every process the same."""
        return self._known(group).shapes

    def is_flat(self, group: Group) -> bool:
        """Whether DeepSpeed has replaced the parameters of a group by flat tensors."""
        originals = self._known(group).originals
        return bool(originals) and is_zero(originals[0]())

    @property
    def is_cut(self) -> bool:
        """Whether ``shard`` or ``slices`` has met a cut weight that still exists."""
        return bool(self._shards or self._slices)

    def shard(self, p: Any, name: str) -> Shard:
        """The entries of a DTensor that this process holds.

        Raises:
            ValueError: as ``shard_of``.
        """
        if p not in self._shards:
            self._shards[p] = shard_of(p, name)
        return self._shards[p]

    def slices(self, group: Group, flat: Tensor) -> list[Slice]:
        """The weights inside a flat tensor of a group: the same weights in the same order on every process.

        Raises:
            RuntimeError: as ``slices_of``.
        """
        if flat not in self._slices:
            noted = self._known(group)
            self._slices[flat] = noted, slices_of(flat, self.originals(group), noted.shapes)
        return self._slices[flat][1]

    def flats(self, group: Group) -> list[Tensor]:
        """The flat tensors of a group in DeepSpeed's order, also before the first step and between steps."""
        return flats_of(group["params"], self.originals(group))

    def stepped_flats(self, group: Group) -> list[Tensor]:
        """The flat tensors of a group that steps have used; between steps ZeRO-3 leaves the group itself empty."""
        noted = self._known(group)
        return [flat for flat, (owner, _) in self._slices.items() if owner is noted]

    def _known(self, group: Group) -> Noted:
        return self._noted[_key(group)]


def _key(group: Group) -> str:
    """The first name identifies a group: DeepSpeed hides other groups in a step, and a load replaces the mapping."""
    return next(iter(group.get("names", ())), "")
