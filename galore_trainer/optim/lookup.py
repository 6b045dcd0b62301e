"""Finds the weights of an optimizer's groups, wherever they lie: those with gradients, and all of them by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig, check_settings
from galore_trainer.core.galore import compute_dtype
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.errors import OptionError
from galore_trainer.layouts.find import PLAIN_TYPES, Placement, is_cut, local
from galore_trainer.layouts.shard import Shard
from galore_trainer.optim.kept import KeptGradient, sketch_matrices
from galore_trainer.optim.layerwise import ProjectedGradient
from galore_trainer.optim.local import LocalWeight
from galore_trainer.optim.param_groups import check_groups, check_noted, noted_of
from galore_trainer.optim.saved_groups import checked_shard
from galore_trainer.optim.state_forms import StateInFlat
from galore_trainer.targets.matrices import check_shardable

Groups = Sequence[dict[str, Any]]


def weights_with_gradients(
    groups: Groups, states: Any, placement: Placement, config: GaLoreConfig
) -> Iterator[LocalWeight]:
    """The weights that a step moves.

    Whole projected weights of one shape come one after the other, large ones first: a device has most to do when it
    begins.

    Args:
        groups, states, placement, config: of the optimizer.

    Raises:
        OptionError: a gradient is sparse, a parameter is no longer what its state was made for, or cut weights meet a
            setting that needs whole ones.
    """
    check_groups(placement, groups)
    for group in groups:
        flat, noted = placement.is_flat(group), noted_of(placement, group)
        params, names, projected = group["params"], group["names"], group["projected"] and not flat
        for i in noted.by_size if projected else range(len(params)):
            p = params[i]
            if (grad := p.grad) is None:
                continue
            if grad.layout is not torch.strided:
                raise OptionError(names[i], "a sparse gradient", "a dense one", "Use sparse=False.")
            if grad.is_neg() or (grad.dtype != p.dtype and compute_dtype(grad.dtype) != compute_dtype(p.dtype)):
                grad = grad.resolve_neg().to(compute_dtype(p.dtype))
            moved = type(p) in PLAIN_TYPES and p.data_ptr() != noted.addresses[i]
            if not flat and (moved or p.shape != noted.shapes[i]):
                check_noted(noted, group, i, states.get(p))
            matrices = group["matrices"][i] if projected else ()
            if flat or is_cut(p):
                if not placement.is_cut:
                    check_settings(config, "shards")
                if flat:
                    check_sees_all(config)
                    yield from _in_flat(group, p, states[p], placement)
                else:
                    yield _cut_weight(group, i, grad, states[p], placement)
                continue
            kept: Any = None
            if type(grad) is not Tensor and isinstance(grad, ProjectedGradient):
                grad, kept = (grad, grad.parts) if grad.whole is None else (grad.whole, None)
            yield LocalWeight(names[i], group, states[p], noted.shards[i], p, grad, matrices, kept)


def check_sees_all(config: GaLoreConfig) -> None:
    """Raise ``OptionError`` for clipping inside the step where DeepSpeed steps one group of weights after the other."""
    if config.max_grad_norm is not None:
        raise OptionError(
            "galore.max_grad_norm",
            f"{config.max_grad_norm} under DeepSpeed",
            "unset there: no step sees the gradients of all groups",
            "DeepSpeed clips before it calls the optimizer: set gradient_clipping in its settings, or the Trainer's "
            "max_grad_norm beside gradient_clipping: auto.",
        )


def whole_weight(group: dict[str, Any], i: int, grad: Tensor, states: Any, placement: Placement) -> LocalWeight:
    """Parameter ``i`` of a group, which is whole, with a gradient."""
    matrices = group["matrices"][i] if group["projected"] else ()
    p, shard = group["params"][i], noted_of(placement, group).shards[i]
    return LocalWeight(group["names"][i], group, states[p], shard, p, grad, matrices)


def _shardable_matrices(group: dict[str, Any], i: int) -> Sequence[LogicalMatrix]:
    """The logical matrices of parameter ``i`` of a group, none in a plain one; refuses those that cannot be cut."""
    matrices: Sequence[LogicalMatrix] = group["matrices"][i] if group["projected"] else ()
    for matrix in matrices:
        check_shardable(matrix, group["names"][i])
    return matrices


def _cut_weight(group: dict[str, Any], i: int, grad: Tensor, state: Any, placement: Placement) -> LocalWeight:
    """Parameter ``i`` of a group, of which this process holds some rows."""
    p, name, matrices = group["params"][i], group["names"][i], _shardable_matrices(group, i)
    shard = checked_shard(placement, p, name)
    return LocalWeight(name, group, state, shard, local(p).detach().view(-1), local(grad).reshape(-1), matrices)


def _in_flat(group: dict[str, Any], flat: Tensor, state: Any, placement: Placement) -> Iterator[LocalWeight]:
    """The weights inside a flat tensor of DeepSpeed; all plain ones of it are one ``LocalWeight`` with one flag."""
    slices, names, weight, grad = placement.slices(group, flat), group["names"], flat.detach(), flat.grad
    assert grad is not None
    if not group["projected"]:
        shard = Shard(rows=flat.numel(), columns=1, start=0, stop=flat.numel(), ranks=slices[0].shard.ranks)
        yield LocalWeight(names[0], group, state, shard, weight, grad)
        return
    for part in slices:
        name, matrices = names[part.index], _shardable_matrices(group, part.index)
        made_in = torch.bfloat16 if part.dtype == torch.bfloat16 else None  # for gradients, whatever adds them up
        of_weight = StateInFlat(state, name)
        yield LocalWeight(
            name, group, of_weight, part.shard, part.of(weight), part.of(grad), matrices, compute_in=made_in
        )


def whole_gradients(weights: Sequence[LocalWeight]) -> list[Tensor]:
    """The gradients that are whole."""
    return [w.grad for w in weights if w.shard.is_whole and type(w.grad) is Tensor]


def smallest_of(grads: Sequence[Tensor]) -> Tensor | None:
    """The gradient with the fewest entries, if any has one."""
    return min((grad for grad in grads if grad.numel()), key=Tensor.numel, default=None)


def kept_gradients(
    w: LocalWeight, config: GaLoreConfig, seed: int, direction: Callable[..., Tensor]
) -> list[KeptGradient]:
    """What layer-wise mode shall keep of the gradient of each matrix of a weight that has a state.

    Args:
        w: with a gradient that backward has just made.
        config, seed: of the optimizer.
        direction: (matrix, like) to a random direction for this step; see ``Directions``.
    """
    kept = []  # no stopwatch: it would take the host a fifth of all this, and device time belongs to backward
    for m in w.matrices:
        sketches = functools.partial(sketch_matrices, m, config, seed, m.logical(w.name), w.weight.device)
        kept.append(KeptGradient(m, w.state, sketches, direction(m, like=w.grad) if w.has_basis else None))
    return kept


# ---------------------------------------------------------------------- by name


def named_states(groups: Groups, states: Any, placement: Placement) -> list[tuple[str, Any]]:
    """Name and state of every weight that has one."""
    named: list[tuple[str, Any]] = []
    for group in groups:
        names, kept = group["names"], _tensors_with_state(group, states, placement)
        if not placement.is_flat(group):
            named += [(name, states[p]) for name, p in zip(names, group["params"], strict=True) if p in states]
        elif not group["projected"]:
            named += [(names[0], states[flat]) for flat in kept]
        else:
            of_flats = [(name, StateInFlat(states[flat], name)) for flat in kept for name in names]
            named += [(name, state) for name, state in of_flats if state]
    return named


def kept_states(groups: Groups, states: Any, placement: Placement) -> list[tuple[bool, dict[str, Any]]]:
    """Every state as it is kept, one for each parameter or flat tensor, with whether its group is projected."""
    pairs = [(group["projected"], p) for group in groups for p in _tensors_with_state(group, states, placement)]
    return [(projected, states[p]) for projected, p in pairs]


def _tensors_with_state(group: dict[str, Any], states: Any, placement: Placement) -> list[Tensor]:
    tensors = placement.stepped_flats(group) if placement.is_flat(group) else group["params"]
    return [p for p in tensors if states.get(p)]


def model_weights(groups: Groups, placement: Placement) -> list[tuple[str, Tensor]]:
    """Name and tensor of every weight as the model holds it: under ZeRO not the flat tensors."""
    weights: list[tuple[str, Tensor]] = []
    for group in groups:
        params = placement.originals(group) if placement.is_flat(group) else group["params"]
        weights += [(name, p) for name, p in zip(group["names"], params, strict=True) if p is not None]
    return weights


def projected_weights(groups: Groups, placement: Placement) -> list[tuple[str, Tensor]]:
    """Name and local entries of every projected weight."""
    weights: list[tuple[str, Tensor]] = []
    for group in (group for group in groups if group["projected"]):
        names = group["names"]
        if not placement.is_flat(group):
            weights += [(name, local(p)) for name, p in zip(names, group["params"], strict=True)]
            continue
        for flat in placement.stepped_flats(group) or group["params"]:
            weights += [(names[part.index], part.of(flat)) for part in placement.slices(group, flat)]
    return weights


def without_gradient(groups: Groups, states: Any, placement: Placement) -> list[str]:
    """Names of weights that train and have no state; none under DeepSpeed, which fills in zero gradients."""
    whole = [group for group in groups if not placement.is_flat(group)]
    pairs = [pair for group in whole for pair in zip(group["names"], group["params"], strict=True)]
    return [name for name, p in pairs if p.requires_grad and not states.get(p)]
