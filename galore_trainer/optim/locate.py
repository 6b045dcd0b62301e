"""Which weights in an optimizer's group this process holds in part, and where: asked in every step.

accelerate swaps parameters after the optimizer is built (FSDP2 puts DTensors in their place, ZeRO one flat tensor a
group), so nothing is known before. Names and logical matrices ride on the group.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_trainer.config import check_settings
from galore_trainer.core.galore import compute_dtype
from galore_trainer.errors import OptionError
from galore_trainer.layouts.dtensor import is_dtensor, local, shard_of
from galore_trainer.layouts.shard import Shard
from galore_trainer.layouts.zero import Slice, flats_of, is_zero, slices_of
from galore_trainer.optim.group_settings import check_unchanged
from galore_trainer.optim.held import Held
from galore_trainer.optim.pieces import Piece, pieces_of
from galore_trainer.targets.matrices import check_shardable

if TYPE_CHECKING:
    from galore_trainer.optim.galore_adamw import GaLoreAdamW

Found = tuple[Shard, list[list[Piece]]]
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
BAR = "|"  # between a weight's name and a key, in the state of a flat tensor


class OneOf(MutableMapping[str, Any]):
    """The state of one weight within that of a flat tensor: ``name|key``."""

    def __init__(self, whole: dict[str, Any], name: str) -> None:
        self.whole, self.prefix = whole, name + BAR

    def __getitem__(self, key: str) -> Any:
        return self.whole[self.prefix + key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.whole[self.prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self.whole[self.prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (key[len(self.prefix) :] for key in list(self.whole) if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return self.prefix + "calls" in self.whole  # without looking at every key of every weight


class Noted:
    """What a group's parameters were when they were added, or when they were last found to fit.

    Attributes:
        originals: the parameters themselves.
        shapes, dtypes, addresses: of each; an address is 0 where it is of no use.
        by_size: places, large shapes first, equal ones in their order.
        projected: whether the group is.
    """

    def __init__(self, params: Sequence[Tensor], *, projected: bool = False) -> None:
        self.projected = projected
        self.originals = [weakref.ref(p) for p in params]
        self.shapes = [torch.Size(getattr(p, "ds_shape", p.shape)) for p in params]
        self.dtypes = [p.dtype for p in params]
        self.addresses = [address_of(p) for p in params]
        keys = [(shape.numel(), tuple(shape)) for shape in self.shapes]
        self.by_size = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)

    def note(self, i: int, p: Tensor) -> None:
        """Remember a parameter as it is now."""
        self.shapes[i], self.dtypes[i], self.addresses[i] = p.shape, p.dtype, address_of(p)


def _by_hand(got: str) -> OptionError:
    return OptionError("param_groups", got, "groups as they were added", "Use add_param_group.")


def _key(group: Mapping[str, Any]) -> str:
    """What tells a group from others. DeepSpeed hides other groups in a step, and a load replaces the mapping."""
    return next(iter(group.get("names", ())), "")


def address_of(p: Tensor) -> int:
    """Where a parameter lies in memory; 0 for tensors that stand for others (DTensors, fake ones)."""
    return p.data_ptr() if type(p) in PLAIN_TYPES else 0


class Locator:
    """Finds weights that are held in part, and remembers where they lie.

    Args:
        optimizer: whose groups are asked about.
    """

    def __init__(self, optimizer: GaLoreAdamW) -> None:
        self.optimizer: GaLoreAdamW = weakref.proxy(optimizer)
        self._noted: dict[str, Noted] = {}
        self._shards: dict[int, tuple[weakref.ref[Tensor], Found]] = {}
        self._slices: dict[int, tuple[weakref.ref[Tensor], Noted, list[Slice], list[Found]]] = {}

    def note(self, group: dict[str, Any]) -> None:
        """Remember the parameters that a new group began with; ZeRO keeps what it knows of its slices on them."""
        self._noted[_key(group)] = Noted(group["params"], projected=group["projected"])

    def noted(self, group: dict[str, Any]) -> Noted:
        """What was noted of a group.

        Raises:
            OptionError: it was put into ``param_groups`` by hand.
        """
        noted = self._noted.get(_key(group))
        if noted is None:
            raise _by_hand("a group put in by hand")
        return noted

    def shapes(self, group: dict[str, Any]) -> list[torch.Size]:
        """The whole shapes of a group's weights."""
        return self.noted(group).shapes

    def check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Raise ``OptionError`` where groups, parameters or settings were changed by hand and cannot be followed."""
        for group in groups:
            check_unchanged(group)
            noted, count = self.noted(group), len(group["params"])
            if len(noted.shapes) != count and not self.is_flat(group):
                raise _by_hand(f"{count} parameters in a group of {len(noted.shapes)}")
            if noted.projected != group["projected"]:
                raise _by_hand(f"projected {group['projected']} in a group that was added with {noted.projected}")
        keys = [_key(group) for group in groups if group["names"]]
        if len(set(keys)) < len(keys):
            raise _by_hand("two groups of the same names")

    def originals(self, group: dict[str, Any]) -> list[Any]:
        """The parameters that a group began with; None where one is gone."""
        return [ref() for ref in self.noted(group).originals]

    def is_flat(self, group: dict[str, Any]) -> bool:
        """Whether DeepSpeed has put a flat tensor in the place of a group's parameters."""
        originals = self.noted(group).originals
        return bool(originals) and is_zero(originals[0]())

    def leaves(self) -> list[tuple[str, Tensor]]:
        """Name and tensor of every weight, as autograd knows it: under ZeRO the model's own parameters."""
        found: list[tuple[str, Tensor]] = []
        for group in self.optimizer.param_groups:
            flat = self.is_flat(group)
            params = self.originals(group) if flat else group["params"]
            found += [(n, p) for n, p in zip(group["names"], params, strict=True) if p is not None]
        return found

    def check_if_changed(self, group: dict[str, Any], i: int) -> None:
        """``check`` a parameter whose shape or place in memory is no longer what was noted."""
        noted, p = self.noted(group), group["params"][i]
        if p.shape != noted.shapes[i] or address_of(p) != noted.addresses[i]:
            self.check(group, i)

    def check(self, group: dict[str, Any], i: int) -> None:
        """Look at a parameter again whose shape or place in memory has changed since it was noted.

        Raises:
            OptionError: it does not fit its state, its logical matrices or its gradient any more.
        """
        noted, p, name = self.noted(group), group["params"][i], group["names"][i]
        way_out = "Change a model before its optimizer is built, or build a new one."
        state = self.optimizer.state.get(p)
        if p.shape != noted.shapes[i] and (state or group["projected"]):
            now, before = list(p.shape), list(noted.shapes[i])
            raise OptionError("parameters", f"{name} of shape {now}", f"shape {before}, as when it was added", way_out)
        if p.grad is not None and p.grad.shape != p.shape:
            got = f"{name} of shape {list(p.shape)} with a gradient of shape {list(p.grad.shape)}"
            raise OptionError("parameters", got, "a gradient of its own shape", "Call zero_grad and backward again.")
        if state:
            own = state["skipped"].device
            if own != p.device:
                wanted = f"{own}, where its state lies"
                raise OptionError("parameters", f"{name} on {p.device}", wanted, way_out)
            kinds = {compute_dtype(dtype) for dtype in (p.dtype, noted.dtypes[i])}
            if len(kinds) > 1:
                wanted = f"{noted.dtypes[i]}, which its state was made for"
                raise OptionError("parameters", f"{name} in {p.dtype}", wanted, way_out)
        noted.note(i, p)

    def held(self) -> list[Held]:
        """The weights with gradients that are held in part, the same on every process, in the same order."""
        found: list[Held] = []
        for group in self.optimizer.param_groups:
            flat = self.is_flat(group)
            for i, p in enumerate(group["params"]):
                if p.grad is None or not (flat or is_dtensor(p)):
                    continue
                if not (self._shards or self._slices):
                    check_settings(self.optimizer.config, "shards")
                found += self._in_flat(group, p) if flat else [self._dtensor(group, p, i)]
        return found

    def named_states(self, group: dict[str, Any]) -> list[tuple[str, Any]]:
        """Name and state of every weight of a group that has one."""
        state = self.optimizer.state
        if not self.is_flat(group):
            return [(n, state[p]) for n, p in zip(group["names"], group["params"], strict=True) if p in state]
        own = [state[flat] for flat in self._flats(group) if state.get(flat)]
        if not group["projected"]:
            return [(group["names"][0], whole) for whole in own]
        pairs = [(n, OneOf(whole, n)) for whole in own for n in group["names"]]
        return [(name, one) for name, one in pairs if "calls" in one]

    def states(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """The states of a group as they are kept: one for each parameter or flat tensor."""
        tensors = self._flats(group) if self.is_flat(group) else group["params"]
        return [self.optimizer.state[p] for p in tensors if p in self.optimizer.state]

    def weights(self, group: dict[str, Any]) -> list[tuple[str, Tensor]]:
        """Name and local entries of every weight of a projected group."""
        if not self.is_flat(group):
            return [(n, local(p)) for n, p in zip(group["names"], group["params"], strict=True)]
        flats = self._flats(group) or group["params"]
        pairs = [(flat, piece) for flat in flats for piece in self._find_slices(group, flat)[0]]
        return [(group["names"][piece.index], piece.of(flat)) for flat, piece in pairs]

    def shard(self, group: dict[str, Any], i: int) -> Shard:
        """Where this process's rows of a DTensor of a group lie.

        Raises:
            OptionError: it is not cut between its rows, once.
        """
        try:
            return shard_of(group["params"][i], group["names"][i])
        except ValueError as error:
            raise OptionError("fsdp", str(error), "FSDP2, whole or hybrid", "See the README's backends.") from None

    def slices(self, group: dict[str, Any]) -> list[tuple[Tensor, list[tuple[str, Slice]]]]:
        """The flat tensors of a group, before the first step and between steps too, each with its weights by name.

        Each process has the same weights, in the same order; the slice of some may be empty.
        """
        flats = flats_of(group["params"], self.originals(group))
        return [(flat, [(group["names"][s.index], s) for s in self._find_slices(group, flat)[0]]) for flat in flats]

    def _flats(self, group: dict[str, Any]) -> list[Tensor]:
        """The flat tensors of a group that were seen in steps: between them ZeRO-3 leaves its groups empty."""
        noted = self.noted(group)
        return [flat for ref, owner, _, _ in self._slices.values() if owner is noted and (flat := ref()) is not None]

    def _dtensor(self, group: dict[str, Any], p: Any, i: int) -> Held:
        matrices = group["matrices"][i] if group["projected"] else []
        known = self._shards.get(id(p))
        if known is None or known[0]() is not p:
            shard = self.shard(group, i)
            known = (weakref.ref(p), (shard, self._pieces(group["names"][i], matrices, shard)))
            self._shards[id(p)] = known
        shard, pieces = known[1]
        weight, grad = local(p).detach(), local(p.grad)
        return Held(
            group["names"][i], group, self.optimizer.state[p], shard, weight.view(-1), grad.reshape(-1), matrices,
            pieces,
        )  # fmt: skip

    def _in_flat(self, group: dict[str, Any], flat: Tensor) -> list[Held]:
        slices, found = self._find_slices(group, flat)
        assert flat.grad is not None
        state, weights, low = self.optimizer.state[flat], flat.detach(), torch.bfloat16
        if not group["projected"]:  # elementwise: the whole slice at once
            ranks = slices[0].shard.ranks
            size = flat.numel()
            shard = Shard(rows=size, columns=1, start=0, stop=size, boundaries=(), ranks=ranks)
            return [Held(group["names"][0], group, state, shard, flat.detach(), flat.grad)]
        return [
            Held(
                group["names"][piece.index], group, OneOf(state, group["names"][piece.index]), shard,
                piece.of(weights), piece.of(flat.grad), group["matrices"][piece.index], pieces,
                low if piece.dtype == low else None,  # in which gradients are made, whatever adds them up
            )
            for piece, (shard, pieces) in zip(slices, found, strict=True)
        ]  # fmt: skip

    def _find_slices(self, group: dict[str, Any], flat: Tensor) -> tuple[list[Slice], list[Found]]:
        known = self._slices.get(id(flat))
        if known is None or known[0]() is not flat:
            noted = self.noted(group)
            slices = slices_of(flat, self.originals(group), noted.shapes)
            names = group["names"]
            matrices = group["matrices"] if group["projected"] else [[] for _ in names]
            found = [(s.shard, self._pieces(names[s.index], matrices[s.index], s.shard)) for s in slices]
            known = (weakref.ref(flat), noted, slices, found)
            self._slices[id(flat)] = known
        return known[2], known[3]

    def _pieces(self, name: str, matrices: list[Any], shard: Shard) -> list[list[Piece]]:
        for matrix in matrices:
            check_shardable(matrix, name)
        return [pieces_of(m, m.logical(name), shard.rows, shard.first, shard.local_rows) for m in matrices]
