"""Which weights in an optimizer's group this process holds in part, and where: asked in every step.

accelerate swaps parameters after the optimizer is built (FSDP2 puts DTensors in their place, ZeRO one flat tensor a
group), so nothing is known before. Names, shapes and logical matrices ride on the group.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from galore_trainer.errors import OptionError
from galore_trainer.layouts.dtensor import is_dtensor, local, shard_of
from galore_trainer.layouts.shard import Shard
from galore_trainer.layouts.zero import Slice, is_zero, slices_of
from galore_trainer.optim.pieces import Piece, pieces_of
from galore_trainer.optim.sharded import Held

if TYPE_CHECKING:
    from galore_trainer.optim.galore_adamw import GaLoreAdamW

Found = tuple[Shard, list[list[Piece]]]
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


class Locator:
    """Finds weights that are held in part, and remembers where they lie.

    Args:
        optimizer: whose groups are asked about.
    """

    def __init__(self, optimizer: GaLoreAdamW) -> None:
        self.optimizer: GaLoreAdamW = weakref.proxy(optimizer)
        self._originals: list[list[weakref.ref[Tensor]]] = []
        self._shards: dict[int, tuple[weakref.ref[Tensor], Found]] = {}
        self._slices: dict[int, tuple[weakref.ref[Tensor], list[Slice], list[Found]]] = {}

    def note(self, group: dict[str, Any]) -> None:
        """Remember the parameters that a group began with; ZeRO keeps what it knows of its slices on them."""
        group["gid"] = len(self._originals)
        group["shapes"] = [tuple(getattr(p, "ds_shape", p.shape)) for p in group["params"]]
        self._originals.append([weakref.ref(p) for p in group["params"]])

    def is_flat(self, group: dict[str, Any]) -> bool:
        """Whether DeepSpeed has put a flat tensor in the place of a group's parameters."""
        return bool(self._originals[group["gid"]]) and is_zero(self._originals[group["gid"]][0]())

    def is_held(self, group: dict[str, Any], p: Tensor) -> bool:
        """Whether a parameter of a group is only this process's part of a weight, or of several."""
        return is_dtensor(p) or self.is_flat(group)

    def held(self) -> list[Held]:
        """The weights with gradients that are held in part, the same on every process, in the same order."""
        found: list[Held] = []
        for group in self.optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                if p.grad is None or not self.is_held(group, p):
                    continue
                found += self._in_flat(group, p) if self.is_flat(group) else [self._dtensor(group, p, i)]
        return found

    def named_states(self, group: dict[str, Any]) -> list[tuple[str, Any]]:
        """Name and state of every weight of a group that has one."""
        state = self.optimizer.state
        if not self.is_flat(group):
            return [(n, state[p]) for n, p in zip(group["names"], group["params"], strict=True) if p in state]
        if not group["projected"]:
            return [(group["names"][0], state[p]) for p in group["params"] if state.get(p)]
        pairs = [(n, OneOf(state[p], n)) for p in group["params"] if p in state for n in group["names"]]
        return [(name, own) for name, own in pairs if "calls" in own]

    def weights(self, group: dict[str, Any]) -> list[tuple[str, Tensor]]:
        """Name and local entries of every weight of a projected group."""
        if not self.is_flat(group):
            return [(n, local(p)) for n, p in zip(group["names"], group["params"], strict=True)]
        pairs = [(p, piece) for p in group["params"] for piece in self._find_slices(group, p)[0]]
        return [(group["names"][piece.index], piece.of(p)) for p, piece in pairs]

    def _dtensor(self, group: dict[str, Any], p: Any, i: int) -> Held:
        matrices = group["matrices"][i] if group["projected"] else []
        known = self._shards.get(id(p))
        if known is None or known[0]() is not p:
            try:
                shard = shard_of(p, group["names"][i])
            except ValueError as error:
                raise OptionError("fsdp", str(error), "FSDP2, whole or hybrid", "See the README's backends.") from None
            known = (weakref.ref(p), (shard, self._pieces(group["names"][i], matrices, shard)))
            self._shards[id(p)] = known
        shard, pieces = known[1]
        weight, grad = local(p.detach()), local(p.grad)
        return Held(
            group["names"][i], group, self.optimizer.state[p], shard, weight.view(-1), grad.reshape(-1), matrices,
            pieces,
        )  # fmt: skip

    def _in_flat(self, group: dict[str, Any], flat: Tensor) -> list[Held]:
        slices, found = self._find_slices(group, flat)
        assert flat.grad is not None
        state = self.optimizer.state[flat]
        if not group["projected"]:  # elementwise: the whole slice at once
            ranks = slices[0].shard.ranks
            size = flat.numel()
            shard = Shard(rows=size, columns=1, start=0, stop=size, boundaries=(), ranks=ranks)
            return [Held(group["names"][0], group, state, shard, flat.detach(), flat.grad)]
        return [
            Held(
                group["names"][piece.index], group, OneOf(state, group["names"][piece.index]), shard,
                piece.of(flat.detach()), piece.of(flat.grad), group["matrices"][piece.index], pieces,
            )
            for piece, (shard, pieces) in zip(slices, found, strict=True)
        ]  # fmt: skip

    def _find_slices(self, group: dict[str, Any], flat: Tensor) -> tuple[list[Slice], list[Found]]:
        known = self._slices.get(id(flat))
        if known is None or known[0]() is not flat:
            originals = [ref() for ref in self._originals[group["gid"]]]
            slices = slices_of(flat, originals, group["shapes"])
            names = group["names"]
            matrices = group["matrices"] if group["projected"] else [[] for _ in names]
            found = [(s.shard, self._pieces(names[s.index], matrices[s.index], s.shard)) for s in slices]
            known = (weakref.ref(flat), slices, found)
            self._slices[id(flat)] = known
        return known[1], known[2]

    def _pieces(self, name: str, matrices: list[Any], shard: Shard) -> list[list[Piece]]:
        for matrix in matrices:
            check_shardable(matrix, name)
        return [
            pieces_of(m, f"{name}.{m.label}" if m.label else name, shard.rows, shard.first, shard.local_rows)
            for m in matrices
        ]


def check_shardable(matrix: Any, name: str) -> None:
    """Raise ``OptionError`` for a matrix that is projected across the rows by which it is cut."""
    if matrix.transposed:
        raise OptionError(
            "galore.target_modules", f"{name}, stored as [in, out], in shards", "weights stored as [out, in]",
            "Train this model under DDP, or leave the module out of target_modules.",
        )  # fmt: skip
    if matrix.side != "right":
        raise OptionError(
            "galore.proj_type", f"the left side of {name}, in shards", "proj_type right under FSDP and DeepSpeed",
            "Set galore.proj_type=right (galore_plugin does so by itself).",
        )  # fmt: skip
