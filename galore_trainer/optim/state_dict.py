"""The optimizer's state through ``state_dict`` and ``load_state_dict``: what is written, read, and refused."""

from __future__ import annotations

import copy
import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.galore import compute_dtype
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.core.precision import Form, stored_basis_form, stored_form
from galore_trainer.errors import OptionError
from galore_trainer.layouts.dtensor import is_dtensor
from galore_trainer.optim import residual_state
from galore_trainer.optim.group_settings import OVERRIDES, check_unchanged
from galore_trainer.optim.sharded_state import pack_shards, unpack_shard
from galore_trainer.optim.skips import some_of
from galore_trainer.optim.stack import AGE, BASIS, MOMENTS, SCALE
from galore_trainer.optim.state import (
    COUNTERS,
    SLICES,
    WAY_OUT,
    bare,
    check_same_layout,
    check_same_method,
    packed_counters,
    restored,
)
from galore_trainer.optim.whole import describe, slices_for_saving
from galore_trainer.targets.matrices import has_residual, support_shape

if TYPE_CHECKING:
    from galore_trainer.optim.galore_adamw import GaLoreAdamW

STEPS, STATES = "steps", "states"
"""Keys of a state dict: the largest ``calls`` and the number of parameters with a state, which tell what is missing."""
PARTIAL = (
    "Save optimizer.state_dict() with torch.save and load all of it. torch.distributed.checkpoint and "
    "flatten_optimizer_state_dict fill in only the keys that the new optimizer's state has already, and a residual's "
    "come later; with residual_percent 0, or under FSDP2, these are all."
)


# ---------------------------------------------------------------------- saving


def pack(optimizer: GaLoreAdamW) -> dict[str, Any]:
    """What ``GaLoreAdamW.state_dict`` returns: tensors, numbers, strings, and lists and mappings of them."""
    groups, locator = optimizer.param_groups, optimizer._locator
    number: dict[int, int] = {}
    for group in groups:
        for p in group["params"]:
            number.setdefault(id(p), len(number))
    saved: dict[str, Any] = {
        "state": {number.get(id(p), p): packed_counters(state) for p, state in optimizer.state.items()},
        "param_groups": [{**group, "params": [number[id(p)] for p in group["params"]]} for group in groups],
    }
    pack_shards(saved, groups, optimizer.config)
    if any(locator.is_flat(group) for group in groups):
        saved[SLICES] = slices_for_saving(groups, locator)
    for group in saved["param_groups"]:
        if group["projected"]:
            group["matrices"] = describe(group["matrices"])
    for key, count in ((STEPS, steps_of(saved["state"])), (STATES, sum(map(bool, saved["state"].values())))):
        saved[key] = torch.tensor(count, dtype=torch.int64, device="cpu")
    return saved


def steps_of(states: Mapping[Any, Mapping[str, Any]]) -> int:
    """The largest ``calls`` in the states of parameters."""
    calls = [int(v) for state in states.values() for k, v in state.items() if bare(k) == "calls"]
    return max(calls, default=0)


# ---------------------------------------------------------------------- loading


def unpack(optimizer: GaLoreAdamW, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Groups and states, in new tensors, for ``Optimizer.__setstate__``; every tensor keeps its dtype.

    Args:
        optimizer: whose groups are filled; it is not changed.
        saved: from ``pack`` of this or an earlier version.

    Raises:
        OptionError: a state of another optimizer, method or layout, or one that is not whole.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        wanted = "one saved by GaLoreAdamW, with state and param_groups"
        raise OptionError("optimizer", type(saved).__name__, wanted, WAY_OUT)
    groups, locator = optimizer.param_groups, optimizer._locator
    check_same_method(saved["param_groups"], groups)
    check_same_layout(saved, groups, any(locator.is_flat(group) for group in groups))
    states = _states_by_number(saved)
    found: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    new_groups = []
    for group, before in zip(groups, saved["param_groups"], strict=True):
        flat = locator.is_flat(group)
        for i, (p, key) in enumerate(zip(group["params"], before["params"], strict=True)):
            state = states.pop(key, None)
            if state and flat:
                found[p] = restored(state, p)
            elif state and is_dtensor(p):
                found[p] = restored(unpack_shard(state, p), p)
            elif state:
                matrices = group["matrices"][i] if group["projected"] else None
                found[p] = _checked(restored(state, p), group["names"][i], p, matrices, optimizer.config)
        new_groups.append(_new_group(group, before))
    if states:
        got = f"states of {sorted(map(str, states))}, which are no parameters"
        raise OptionError("checkpoint", got, "states of its own parameters", WAY_OUT)
    if (count := int(saved.get(STATES, len(found)))) > len(found):
        names = [n for g in groups for n, p in zip(g["names"], g["params"], strict=False) if p not in found]
        got = f"the states of {len(found)} parameters out of {count}, without {some_of(names)}"
        raise OptionError("checkpoint", got, "the states of all parameters", PARTIAL)
    if (steps := int(saved.get(STEPS, steps_of(found)))) != steps_of(found):
        got = f"a state dict of {steps} steps whose parameters have taken {steps_of(found)}"
        raise OptionError("checkpoint", got, "the states of all parameters", PARTIAL)
    return {"state": found, "param_groups": new_groups}


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
    new["betas"] = tuple(new["betas"])
    check_unchanged(new)
    return new


def _checked(
    state: dict[str, Any], name: str, p: Tensor, matrices: Sequence[LogicalMatrix] | None, config: GaLoreConfig
) -> dict[str, Any]:  # fmt: skip
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
        if key.endswith("_index") and not 0 <= int(value.min()) <= int(value.max()) < p.numel():
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
        if not has_residual(matrix, config) or int(state.get("refreshes", 0)) <= config.sketches_first:
            continue
        blocks, lines, entries = support_shape(matrix, config)
        if prefix + "candidate_index" in state:
            shape = tuple(state[prefix + "candidate_index"].shape)  # as many as the lines hold, at most
            yield prefix + "candidate_index", Form((blocks, lines, shape[-1]), torch.int32)
            yield prefix + "candidate_mean", Form((blocks, lines, shape[-1]), wide)
            continue
        yield prefix + "residual_index", Form((blocks, lines, entries), torch.int32)
        yield prefix + residual_state.AGE, age
        for key, _ in residual_state.MOMENTS:
            yield from _with_scale(prefix + key, stored_form((blocks, lines, entries), config.state_bits, wide))


def _with_scale(key: str, form: Form) -> Iterator[tuple[str, Form]]:
    yield key, form
    if form.scale is not None:
        yield key + SCALE, Form(form.scale, torch.float32)
