"""The optimizer's state as one process keeps it, made from what any layout saved, and cut again for another layout.

FSDP2 and ZeRO save the state of a projected weight row by row; one process saves it by logical matrix
(``state_forms.py``). A whole state is what ``GaLoreAdamW.state_dict`` gives on one process.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix, stored_rows
from galore_trainer.errors import OptionError
from galore_trainer.layouts.find import Placement, is_cut
from galore_trainer.layouts.shard import Shard
from galore_trainer.optim.bucket import MOMENTS
from galore_trainer.optim.param_groups import SLICES
from galore_trainer.optim.plain import plain_state
from galore_trainer.optim.saved_groups import check_same_method, checked_shard, scale_after_load
from galore_trainer.optim.state_forms import BAR, ROW_KEYS, StateInFlat, restored, without_padding
from galore_trainer.targets.matrices import check_shardable

State = Mapping[str, Any]


# ---------------------------------------------------------------------- one weight


def whole_of_rows(state: State, matrices: Iterable[LogicalMatrix]) -> dict[str, Any]:
    """The state of a projected weight by logical matrix.

    Args:
        state: with all of its rows, [M, width].
        matrices: its logical matrices.
    """
    whole: dict[str, Any] = {}
    for key, value in state.items():
        if key not in ROW_KEYS:
            whole[key] = value
            continue
        for matrix in matrices:
            whole[matrix.prefix + key] = value[stored_rows(matrix, len(value))]  # [blocks, block rows, width]
    return whole


def rows_of_whole(state: State, matrices: Iterable[LogicalMatrix], shard: Shard) -> dict[str, Any]:
    """Undo ``whole_of_rows`` for the rows of one process.

    Args:
        state: by logical matrix.
        matrices: the weight's logical matrices.
        shard: where the process's part lies.
    """
    by_prefix = {matrix.prefix: matrix for matrix in matrices}
    rows: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for key, value in state.items():
        prefix, name = key[: key.rfind(".") + 1], key.rsplit(".", 1)[-1]
        if name not in ROW_KEYS:
            others[key] = value
        elif shard.local_rows or name in ROW_KEYS[:2]:  # without rows there is no residual
            everything = rows.setdefault(name, value.new_zeros(shard.rows, value.shape[-1]))
            everything[stored_rows(by_prefix[prefix], shard.rows)] = value
    here = slice(shard.first, shard.first + shard.local_rows)
    return others | {name: value[here].clone() for name, value in rows.items()}


# ---------------------------------------------------------------------- from what was saved


def whole_of_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The whole state from a state dict of FSDP2 by parameter names, its DTensors complete."""
    states: dict[str, dict[str, Any]] = {}
    for group in saved["param_groups"]:
        for i, (name, key) in enumerate(zip(group["names"], group["params"], strict=True)):
            if not (state := dict(without_padding(saved["state"].get(key, {})))):
                continue
            if group["projected"]:
                rows = {k: v.reshape(-1, v.shape[-1]) if k in ROW_KEYS else v for k, v in state.items()}
                state = whole_of_rows(rows, _matrices(group, i))
            states[name] = state
    return _as_one_process(saved["param_groups"], states)


def whole_of_slices(saved: Sequence[Mapping[str, Any]], flats: Sequence[Sequence[Tensor]]) -> tuple[Any, Any]:
    """The whole state, and the weights in float32 by name, from ZeRO's slices.

    Args:
        saved: the state dict of every process.
        flats: the flat tensors of every process, by their numbers in its state dict.

    Raises:
        OptionError: slices are missing.
    """
    weights: dict[str, Tensor] = {}
    states: dict[str, dict[str, Any]] = defaultdict(dict)
    there: dict[str, int] = defaultdict(int)
    for one, own_flats in zip(saved, flats, strict=True):
        for group in one["param_groups"]:
            for number in group["params"]:
                flat, state = own_flats[number], one["state"].get(number, {})
                for name, shape, start, stop, offset in one[SLICES][number]:
                    shard = _shard(shape, start, stop)
                    whole = weights.setdefault(name, flat.new_empty(shape))
                    whole.view(-1)[start:stop] = flat[offset : offset + stop - start]
                    there[name] += stop - start
                    if not state:
                        continue
                    if group["projected"]:
                        _collect_rows(states[name], StateInFlat(state, name), shard)
                    else:
                        _collect_entries(states[name], state, torch.Size(shape), start, stop, offset)
    for name, whole in weights.items():
        if there[name] != whole.numel():
            raise OptionError(
                "checkpoint",
                f"{there[name]} of the {whole.numel()} numbers of {name}",
                "the files of all processes",
                "One is missing, or written by another run.",
            )
    groups = saved[0]["param_groups"]
    for group in groups:
        for i, name in enumerate(group["names"] if group["projected"] else ()):
            states[name] = whole_of_rows(states[name], _matrices(group, i))
    return _as_one_process(groups, states), weights


def _collect_rows(collected: dict[str, Any], state: State, shard: Shard) -> None:
    for key, value in state.items():
        if key not in ROW_KEYS:
            collected.setdefault(key, value)  # the same on every process
        elif shard.local_rows:
            whole = collected.setdefault(key, value.new_zeros(shard.rows, value.shape[-1]))
            whole[shard.first : shard.first + shard.local_rows][shard.owned] = value[shard.owned]


def _collect_entries(
    collected: dict[str, Any], state: State, shape: torch.Size, start: int, stop: int, offset: int
) -> None:
    moments = [key for key, _ in MOMENTS]
    for key, value in state.items():
        if key in moments:
            collected.setdefault(key, value.new_empty(shape)).view(-1)[start:stop] = value[
                offset : offset + stop - start
            ]
        else:
            collected.setdefault(key, value.clone() if isinstance(value, Tensor) else value)


def _shard(shape: Sequence[int], start: int, stop: int) -> Shard:
    columns = shape[-1]
    return Shard(rows=math.prod(shape) // columns, columns=columns, start=start, stop=stop)


def _matrices(group: Mapping[str, Any], i: int) -> list[LogicalMatrix]:
    return [LogicalMatrix(**fields) for fields in group["matrices"][i]]


def _as_one_process(groups: Sequence[Mapping[str, Any]], states: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of one process; weights are numbered in the groups' order."""
    number = {name: i for i, name in enumerate(name for group in groups for name in group["names"])}
    return {
        "state": {i: dict(states[name]) for name, i in number.items() if states.get(name)},
        "param_groups": [{**group, "params": [number[name] for name in group["names"]]} for group in groups],
    }


# ---------------------------------------------------------------------- into an optimizer


@torch.no_grad()
def put_whole(
    groups: Sequence[dict[str, Any]],
    state: MutableMapping[Tensor, Any],
    placement: Placement,
    saved: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    config: GaLoreConfig,
) -> None:
    """Put a whole state into the groups and the state of an optimizer whose weights are cut; see ``load_whole`` there.

    Args:
        groups, state, placement, config: of an optimizer that FSDP2 or DeepSpeed has wrapped; before its first step.
        saved: a state dict of one process.
        weights: whole, by logical name; DeepSpeed's float32 copies get them.

    Raises:
        OptionError: it was made by another method, or a weight is missing.
    """
    for group, before in zip(groups, saved["param_groups"], strict=False):
        if group["projected"] and before["projected"]:
            _check_cuttable(group, before)
    check_same_method(saved["param_groups"], groups)
    states = {
        name: saved["state"].get(number, {})
        for group in saved["param_groups"]
        for name, number in zip(group["names"], group["params"], strict=True)
    }
    for group, before in zip(groups, saved["param_groups"], strict=True):
        if group["projected"]:
            group["galore"]["scale"] = scale_after_load(group, before)
        kept = ("params", "names", "matrices", "galore", "scale")
        group.update({key: value for key, value in before.items() if key not in kept})
        group["betas"] = tuple(group["betas"])
        if placement.is_flat(group):
            for flat in placement.flats(group):
                state[flat] = restored(_fill_flat(flat, placement, group, states, weights, config), flat)
            continue
        for i, (name, p) in enumerate(zip(group["names"], group["params"], strict=True)):
            if not is_cut(p):
                raise OptionError("checkpoint", f"{name}, whole", "weights cut by FSDP2 or ZeRO", "Resume from it.")
            matrices = group["matrices"][i] if group["projected"] else None
            state[p] = restored(_part_of(states[name], matrices, checked_shard(placement, p, name)), p)


def _part_of(whole: State, matrices: Sequence[LogicalMatrix] | None, shard: Shard) -> State:
    """The rows, or of a plain weight the entries, that a shard holds of a whole state."""
    if not whole:
        return whole
    if matrices is not None:
        return rows_of_whole(whole, matrices, shard)
    keys = [key for key, _ in MOMENTS]
    return {k: v.reshape(-1)[shard.start : shard.stop].clone() if k in keys else v for k, v in whole.items()}


def _check_cuttable(group: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raise ``OptionError`` where projected weights cannot be cut into rows, or were trained as only whole ones are."""
    for matrices, name in zip(group["matrices"], group["names"], strict=True):
        for matrix in matrices:
            check_shardable(matrix, name)
    for field, why in (
        ("proj_type", "Its bases lie across the rows that FSDP2 and ZeRO cut, unless it began with proj_type right."),
        ("layerwise", "Layer-wise mode runs alone and under DDP."),
    ):
        got, wanted = before["galore"].get(field), group["galore"].get(field)
        if got != wanted:
            way_out = f"{why} Stay on one process or DDP, or begin a new run with its weights."
            raise OptionError("checkpoint", f"{field} {got}", f"{field} {wanted}", way_out)


def _fill_flat(
    flat: Tensor,
    placement: Placement,
    group: Mapping[str, Any],
    states: Mapping[str, State],
    weights: Mapping[str, Tensor],
    config: GaLoreConfig,
) -> State:
    """Copy whole weights into a flat tensor; the state of its entries."""
    members = [(group["names"][part.index], part) for part in placement.slices(group, flat)]
    for name, part in members:
        part.of(flat).copy_(weights[name].reshape(-1)[part.shard.start : part.shard.stop])
    with_state = [(states[name], name, part) for name, part in members if states[name]]
    state: dict[str, Any] = {}
    if group["projected"]:
        for whole, name, part in with_state:
            rows = rows_of_whole(whole, group["matrices"][part.index], part.shard)
            state |= {f"{name}{BAR}{key}": value for key, value in rows.items()}
    elif with_state:
        state = plain_state(flat, config.plain_state_bits)
        for whole, _, part in with_state:
            for key, _ in MOMENTS:
                part.of(state[key]).copy_(whole[key].reshape(-1)[part.shard.start : part.shard.stop])
        # one counter for all: they differ only by skipped steps
        state["step"] = torch.stack([whole["step"] for whole, *_ in with_state]).max()
        state["calls"] = max(whole["calls"] for whole, *_ in with_state)
        state["skipped"] = torch.stack([whole["skipped"] for whole, *_ in with_state]).amax(dim=0)
    return state
