"""The optimizer's state through ``state_dict`` and ``load_state_dict``: what is written, read, and refused."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.galore import compute_dtype
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.core.precision import Form, stored_basis_form, stored_form
from galore_trainer.errors import OptionError
from galore_trainer.layouts.find import Placement, is_cut
from galore_trainer.optim import residual
from galore_trainer.optim.bucket import BASIS, MOMENTS, SCALE
from galore_trainer.optim.guards import some_of
from galore_trainer.optim.local import AGE, rows_of_shard
from galore_trainer.optim.param_groups import OVERRIDES, SLICES, check_unchanged
from galore_trainer.optim.saved_groups import (
    WAY_OUT,
    check_same_layout,
    check_same_method,
    saved_settings,
    scale_after_load,
)
from galore_trainer.optim.state_forms import (
    BAR,
    COUNTERS,
    StateInFlat,
    bare,
    one_age,
    packed_counters,
    restored,
    rows_of_dtensor,
    saved_dtensor,
    saved_form,
)

STEPS, STATES = "steps", "states"
"""Keys of a state dict: the largest ``calls`` and the number of parameters with a state, which tell what is missing."""
PARTIAL = (
    "Save optimizer.state_dict() with torch.save and load all of it. torch.distributed.checkpoint and "
    "flatten_optimizer_state_dict fill in only the keys that the new optimizer's state has already, and a residual's "
    "come later; with residual_percent 0, or under FSDP2, these are all."
)


# ---------------------------------------------------------------------- saving


def pack(
    groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Any], placement: Placement, config: GaLoreConfig
) -> dict[str, Any]:
    """What ``GaLoreAdamW.state_dict`` returns: tensors, numbers, strings, and lists and mappings of them.

    Args:
        groups, state, placement, config: of the optimizer.
    """
    number: dict[int, int] = {}
    for group in groups:
        for p in group["params"]:
            number.setdefault(id(p), len(number))
    states = dict(state)
    for group in groups:
        for i, p in enumerate(group["params"]):
            if p in states:
                states[p] = _saved_state(states[p], group, i, placement, config)
    saved: dict[str, Any] = {
        "state": {number.get(id(p), p): packed_counters(saved_state) for p, saved_state in states.items()},
        "param_groups": [{**group, "params": [number[id(p)] for p in group["params"]]} for group in groups],
    }
    if any(placement.is_flat(group) for group in groups):
        saved[SLICES] = _slices(groups, placement)
    for group in saved["param_groups"]:
        if group["projected"]:
            group["matrices"], group["galore"] = describe(group["matrices"]), saved_settings(group)
    for key, count in ((STEPS, steps_of(saved["state"])), (STATES, sum(map(bool, saved["state"].values())))):
        saved[key] = torch.tensor(count, dtype=torch.int64, device="cpu")
    return saved


def _saved_state(
    state: Mapping[str, Any], group: Mapping[str, Any], i: int, placement: Placement, config: GaLoreConfig
) -> Mapping[str, Any]:
    """The state of parameter ``i`` of a group as it is saved."""
    p, projected = group["params"][i], group["projected"]
    if not state or (not projected and not is_cut(p)):
        return state
    if placement.is_flat(group):
        return _saved_flat(state, group, p, placement, config)
    name, matrices = group["names"][i], group["matrices"][i] if projected else ()
    if not is_cut(p):
        return saved_form(state, matrices, config)
    if projected:
        shard = placement.shard(p, name)
        pieces = rows_of_shard(matrices, name, shard, p.device)
        state = saved_form(state, matrices, config, pieces, shard.local_rows, p.dtype)
    return saved_dtensor(state, p, matrices, config)


def _saved_flat(
    state: Mapping[str, Any], group: Mapping[str, Any], flat: Tensor, placement: Placement, config: GaLoreConfig
) -> Mapping[str, Any]:
    names = group["names"]
    if any(f"{name}{BAR}{MOMENTS[0][0]}" in state for name in names):
        return state  # as it was loaded: no step has cut it into pieces
    saved: dict[str, Any] = {}
    of_flat = dict(state)
    for part in placement.slices(group, flat):
        name, matrices, shard = names[part.index], group["matrices"][part.index], part.shard
        if of_weight := StateInFlat(of_flat, name):
            pieces = rows_of_shard(matrices, name, shard, flat.device)
            rows = saved_form(of_weight, matrices, config, pieces, shard.local_rows, flat.dtype)
            saved |= {f"{name}{BAR}{key}": value for key, value in rows.items()}
    return saved


def _slices(groups: Sequence[dict[str, Any]], placement: Placement) -> dict[int, list[Any]]:
    """Of every flat tensor, by its number in a state dict: name, shape, start, stop and offset of each weight in it."""
    slices: dict[int, list[Any]] = {}
    first = 0
    for group in groups:
        number = {id(p): first + i for i, p in enumerate(group["params"])}
        first += len(number)
        names, shapes = group["names"], placement.shapes(group)
        for flat in placement.flats(group):
            if id(flat) in number:
                slices[number[id(flat)]] = [
                    [names[s.index], list(shapes[s.index]), s.shard.start, s.shard.stop, s.offset]
                    for s in placement.slices(group, flat)
                ]
    return slices


def describe(matrices: Sequence[Sequence[LogicalMatrix]]) -> list[list[dict[str, Any]]]:
    """Logical matrices as strings and numbers, for a state dict."""
    return [[dataclasses.asdict(matrix) for matrix in of_weight] for of_weight in matrices]


def steps_of(states: Mapping[Any, Mapping[str, Any]]) -> int:
    """The largest ``calls`` in the states of parameters."""
    calls = [int(v) for state in states.values() for k, v in state.items() if bare(k) == "calls"]
    return max(calls, default=0)


# ---------------------------------------------------------------------- loading


def unpack(
    groups: Sequence[dict[str, Any]], placement: Placement, config: GaLoreConfig, saved: Mapping[str, Any]
) -> dict[str, Any]:
    """Groups and states, in new tensors, for ``Optimizer.__setstate__``; every tensor keeps its dtype.

    Args:
        groups, placement, config: of the optimizer; they are not changed.
        saved: from ``pack`` of this or an earlier version.

    Raises:
        OptionError: a state of another optimizer, method or layout, or one that is not whole.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        wanted = "one saved by GaLoreAdamW, with state and param_groups"
        raise OptionError("optimizer", type(saved).__name__, wanted, WAY_OUT)
    check_same_method(saved["param_groups"], groups)
    check_same_layout(saved, groups, any(placement.is_flat(group) for group in groups))
    states = _states_by_number(saved)
    loaded: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    new_groups = []
    for group, before in zip(groups, saved["param_groups"], strict=True):
        flat = placement.is_flat(group)
        for i, (p, key) in enumerate(zip(group["params"], before["params"], strict=True)):
            state = states.pop(key, None)
            if state and flat:
                loaded[p] = restored(state, p)
            elif state and is_cut(p):
                loaded[p] = restored(rows_of_dtensor(state), p)
            elif state:
                name, matrices = group["names"][i], group["matrices"][i] if group["projected"] else None
                state = restored(state, p)
                if matrices and "skipped" in state:
                    residual.start_norms(state, matrices, config)
                loaded[p] = _checked(state, name, p, matrices, config)
                if matrices:
                    one_age(loaded[p], matrices, name)
        new_groups.append(_new_group(group, before))
    if states:
        got = f"states of {sorted(map(str, states))}, which are no parameters"
        raise OptionError("checkpoint", got, "states of its own parameters", WAY_OUT)
    if (count := int(saved.get(STATES, len(loaded)))) > len(loaded):
        names = [n for g in groups for n, p in zip(g["names"], g["params"], strict=False) if p not in loaded]
        got = f"the states of {len(loaded)} parameters out of {count}, without {some_of(names)}"
        raise OptionError("checkpoint", got, "the states of all parameters", PARTIAL)
    if (steps := int(saved.get(STEPS, steps_of(loaded)))) != steps_of(loaded):
        got = f"a state dict of {steps} steps whose parameters have taken {steps_of(loaded)}"
        raise OptionError("checkpoint", got, "the states of all parameters", PARTIAL)
    return {"state": loaded, "param_groups": new_groups}


def _states_by_number(saved: Mapping[str, Any]) -> dict[Any, Any]:
    """The states by the keys of ``params``.

    ``torch.distributed.checkpoint`` turns numbers into texts, and puts what is no tensor under these.
    """
    states = {key: dict(state) for key, state in saved["state"].items()}
    for key in [key for key in states if isinstance(key, str) and key.isdecimal() and int(key) in states]:
        states[int(key)].update(states.pop(key))
    return states


def _new_group(group: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group for an optimizer: its own parameters and overrides, else what was saved."""
    ours = ("params", "names", "matrices", "galore", *OVERRIDES)
    kept = {key: group[key] for key in ours if key in group}
    saved = {key: copy.deepcopy(value) for key, value in before.items() if key not in ours}
    new = {**group, **saved, **kept}
    if group["projected"] and "scale" not in group:
        new["galore"] = {**group["galore"], "scale": scale_after_load(group, before)}
    new["betas"] = tuple(new["betas"])
    check_unchanged(new)
    return new


def _checked(
    state: dict[str, Any], name: str, p: Tensor, matrices: Sequence[LogicalMatrix] | None, config: GaLoreConfig
) -> dict[str, Any]:
    """The state of a parameter that is held whole, float64 where its weight is.

    Raises:
        OptionError: a key is missing or unknown, or a tensor has another shape or dtype than this parameter needs.
    """
    forms = dict(_forms(state, p, matrices, config))
    counters = COUNTERS if matrices else COUNTERS[:1]
    for key in (*counters, *forms):
        if key not in state:
            raise OptionError("checkpoint", f"a state of {name} without {key}", "its whole state", PARTIAL)
    for key in state:
        if key not in forms and key not in counters:
            nearest = difflib.get_close_matches(key, (*forms, *counters), 1)
            wanted = f"no such key{f' (perhaps {nearest[0]})' if nearest else ''}"
            raise OptionError("checkpoint", f"{key} in the state of {name}", wanted, WAY_OUT)
    for key, form in forms.items():
        value = state[key]
        if tuple(value.shape) != form.shape:
            wanted = f"shape {list(form.shape)}, which its weight of shape {list(p.shape)} needs"
            raise OptionError("checkpoint", f"{name}: {key} of shape {list(value.shape)}", wanted, WAY_OUT)
        if form.dtype == torch.float64 and value.dtype == torch.float32:
            state[key] = value.double()
        elif value.dtype != form.dtype:
            raise OptionError("checkpoint", f"{name}: {key} in {value.dtype}", f"{form.dtype}", WAY_OUT)
        if form.below is not None and not 0 <= int(value.min()) <= int(value.max()) < form.below:
            raise OptionError("checkpoint", f"{name}: {key} outside of the weight", "positions inside it", WAY_OUT)
    return state


def _forms(
    state: Mapping[str, Any], p: Tensor, matrices: Sequence[LogicalMatrix] | None, config: GaLoreConfig
) -> Iterator[tuple[str, Form]]:
    """Key and form of every tensor that the state of a whole parameter holds at its place in a run."""
    wide, age = compute_dtype(p.dtype), Form((), torch.float32)
    yield "skipped", Form((3,), torch.int32)
    if matrices is None:
        form = stored_form((1, p.numel()), config.plain_state_bits, wide)
        yield AGE, age
        for key, _ in MOMENTS:
            yield from _with_scale(key, Form(tuple(p.shape), form.dtype, form.scale and form.scale[1:]))
        return
    for matrix in matrices:
        prefix = matrix.prefix
        yield prefix + AGE, age
        yield from _with_scale(prefix + BASIS, stored_basis_form(matrix.basis_shape, config.basis_bits, wide))
        for key, _ in MOMENTS:
            yield from _with_scale(prefix + key, stored_form(matrix.moment_shape, config.state_bits, wide))
        for key, form in residual.forms(state, matrix, config, wide):
            yield from _with_scale(prefix + key, form)


def _with_scale(key: str, form: Form) -> Iterator[tuple[str, Form]]:
    yield key, form
    if form.scale is not None:
        yield key + SCALE, Form(form.scale, torch.float32)
