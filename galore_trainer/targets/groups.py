"""From a model to parameter groups: what is projected and how, what is plain, what is frozen, and why."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from galore_trainer.config import HEAD_ROLES, GaLoreConfig
from galore_trainer.core.galore import compute_dtype
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.core.precision import stored_basis_bytes, stored_bytes
from galore_trainer.errors import OptionError
from galore_trainer.targets.candidates import (
    Candidate,
    choose_targets,
    embedding_weights,
    find_candidates,
    ranks_by_pattern,
    whole_shape,
)
from galore_trainer.targets.causes import adapters_alone, nothing_projected
from galore_trainer.targets.computed import COMPUTED, check_not_lazy, computed_weight
from galore_trainer.targets.geometry import heads_of
from galore_trainer.targets.matrices import (
    HeadsDoNotFit,
    has_scaled,
    has_sparse,
    project_heads,
    project_whole,
    support_shape,
    unknown_heads,
)
from galore_trainer.targets.names import logical_name, module_of, role_of, should_have_heads

logger = logging.getLogger(__name__)
POSITION_BYTES = 4  # int32
NORM_BYTES = 4  # float32: what limits the growth of the scaled residual
RANK_NOTE = "rank"
"""First word of the note of a weight that is smaller than its rank."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter of the model and what happens to it.

    Attributes:
        name: logical name (without the prefixes of wrappers).
        parameter: the tensor itself.
        matrices: logical matrices where it is projected, else empty.
        note: why a targeted weight is not projected; else empty.
        why_joint: why it is projected without its heads although its name promises some; else empty.
    """

    name: str
    parameter: nn.Parameter
    matrices: tuple[LogicalMatrix, ...] = ()
    note: str = ""
    why_joint: str = ""

    @property
    def kind(self) -> str:
        """``projected``, ``plain`` or ``frozen``."""
        if not self.parameter.requires_grad:
            return "frozen"
        return "projected" if self.matrices else "plain"

    def falls_back(self, config: GaLoreConfig) -> bool:
        """Whether it is an attention weight that should share bases by head and is projected jointly instead."""
        known = any(m.head_dim or m.label for m in self.matrices)  # parts of a fused weight have labels
        return bool(self.matrices) and not known and should_share(module_of(self.name), config)

    def state_bytes(self, config: GaLoreConfig) -> dict[str, int]:
        """Bytes of optimizer state before any step, without counters.

        Returns:
            Bytes by kind: ``basis``, ``moments``, ``residual`` (as it is after its warm-up) and ``plain``.
        """
        size = {"basis": 0, "moments": 0, "residual": 0, "plain": 0}
        dtype = compute_dtype(self.parameter.dtype)
        for matrix in self.matrices:
            size["basis"] += stored_basis_bytes(matrix.basis_shape, config.basis_bits, dtype)
            size["moments"] += 2 * stored_bytes(matrix.moment_shape, config.state_bits, dtype)
            if has_scaled(matrix, config):
                size["residual"] += NORM_BYTES
            if has_sparse(matrix, config):
                shape = support_shape(matrix, config)
                moments = 2 * stored_bytes(shape, config.state_bits, dtype)
                size["residual"] += POSITION_BYTES * math.prod(shape) + moments
        if self.kind == "plain":
            size["plain"] = 2 * stored_bytes((1, self.parameter.numel()), config.plain_state_bits, dtype)
        return size


def should_share(module_name: str, config: GaLoreConfig) -> bool:
    """Whether a weight of this name should share bases by head: it is in an attention, and the settings include it."""
    role = role_of(module_name, config.share_output_heads)
    if config.head_sharing == "joint" or (role in HEAD_ROLES and role not in config.shared_roles):
        return False
    return should_have_heads(module_name, config.share_output_heads)


def plan_weights(model: nn.Module, config: GaLoreConfig) -> list[Weight]:
    """Decide for every parameter of a model, each exactly once, in the model's order.

    Args:
        model: any module; attention heads are read from ``model.config`` as transformers models have it.
        config: see ``GaLoreConfig``; with ``embeddings: frozen`` they stop requiring a gradient here.

    Raises:
        OptionError: a target or rank pattern that matches nothing, a rank that does not fit a module the user named,
            or one whose weight is computed from other parameters, nothing left to project, heads or embeddings that
            are unknown, a lazy layer that has no shape yet.
    """
    check_not_lazy(model)
    candidates = find_candidates(model)
    targets, by_user = choose_targets(candidates, config)
    if config.embeddings == "frozen":
        for parameter in embedding_weights(model, config).values():
            parameter.requires_grad_(False)
    elif config.embeddings == "projected":
        embeddings = embedding_weights(model, config)
        candidates |= {name: Candidate(name=name, parameters=(p,)) for name, p in embeddings.items()}
        targets |= embeddings.keys()
    pattern_ranks = ranks_by_pattern(targets, config)
    # named_parameters() lists a tied weight once, perhaps not under its target's name, so it is looked up by identity;
    # reversed, so that the first of several tied targets counts
    by_parameter = {id(p): c for name, c in reversed(candidates.items()) if name in targets for p in c.parameters}
    weights: list[Weight] = []
    smaller_sides: dict[str, int] = {}
    for full_name, parameter in model.named_parameters():
        name = logical_name(full_name)
        targeted_by_name = module_of(name) in targets
        candidate = candidates[module_of(name)] if targeted_by_name else by_parameter.get(id(parameter))
        if candidate is None or not parameter.requires_grad:
            weights.append(Weight(name, parameter))
            continue
        rank = pattern_ranks.get(candidate.name, config.rank)
        # what the user named is projected or refused; what all-linear or parts of names chose may stay plain
        named_by_user = by_user or candidate.name in pattern_ranks
        if candidate.computed and named_by_user:
            raise computed_weight(candidate.name, name, in_pattern=not by_user)
        smaller_side = min(whole_shape(parameter)[-2:], default=0)
        note = ""
        if candidate.computed:
            note = COMPUTED
        elif not targeted_by_name and not named_by_user:
            note = f"tied to {candidate.name}"  # for example an embedding, which all-linear does not choose
        elif rank > smaller_side and not named_by_user:
            note = f"{RANK_NOTE} {rank} > smaller side {smaller_side}"
            smaller_sides[name] = smaller_side
        if note:
            weights.append(Weight(name, parameter, note=note))
            continue
        matrices, why_joint = _project(candidate, rank, config)
        weights.append(Weight(name, parameter, tuple(matrices), why_joint=why_joint))
    if not any(w.matrices for w in weights):
        any_computed = any(w.note == COMPUTED for w in weights)
        raise nothing_projected(model, config, smaller_sides, bool(targets), any_computed)
    _check_heads(model, weights, config, by_user)
    return weights


def _check_heads(model: nn.Module, weights: list[Weight], config: GaLoreConfig, by_user: bool) -> None:
    """Raise ``OptionError`` where shared heads were asked for and no weight that trains has any."""
    with_heads = {role_of(module_of(w.name), True) for w in weights if any(m.head_dim for m in w.matrices)}
    if config.share_output_heads and "o" not in with_heads:
        wanted = "an output projection of attention that trains and is known by name"
        raise OptionError("galore.share_output_heads", True, wanted)
    if config.head_sharing == "joint" or by_user or with_heads:
        return
    joint = [w for w in weights if w.falls_back(config)]
    if joint and config.head_fallback == "refuse":
        raise unknown_heads(module_of(joint[0].name), config, joint[0].why_joint)
    # without any attention weight that trains, what is projected may be adapters alone
    if not joint and (error := adapters_alone(model, [w.name for w in weights if w.matrices])):
        raise error


def _project(candidate: Candidate, rank: int, config: GaLoreConfig) -> tuple[list[LogicalMatrix], str]:
    """The logical matrices of a weight, and why it is projected without its heads where it should have some."""
    name, shape, transposed = candidate.name, candidate.shape, candidate.transposed
    should = len(shape) == 2 and should_share(name, config)
    role = role_of(name, config.share_output_heads) if should else None
    if role is None:
        reason = "no layout of heads is known by its name" if should else ""
        return [project_whole(shape, name, config, rank, transposed)], reason
    m, n = shape[::-1] if transposed else shape
    model_config = next((c for module in candidate.around if (c := getattr(module, "config", None)) is not None), None)
    attention = next(iter(candidate.around), None)
    try:
        matrices = project_heads(
            name,
            role,
            m,
            n,
            model_type=getattr(model_config, "model_type", ""),
            heads=heads_of(name, attention, model_config),
            config=config,
            rank=rank,
            transposed=transposed,
        )
    except HeadsDoNotFit as error:
        if config.head_fallback == "refuse":
            raise
        return [project_whole(shape, name, config, rank, transposed)], error.reason
    return matrices, ""


def parameter_groups(
    weights: list[Weight], config: GaLoreConfig, *, lr: float, weight_decay: float, no_decay: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Parameter groups for ``GaLoreAdamW``: projected first, so that logs which show the first group's lr show ``lr``.

    Args:
        weights: from ``plan_weights``.
        config: gives ``plain_lr_ratio``.
        lr: learning rate of projected weights (before ``scale``).
        weight_decay: of parameters not in ``no_decay``.
        no_decay: names that are not decayed.
    """
    joint = [(module_of(w.name), w.why_joint) for w in weights if w.falls_back(config)]
    _warn_by_reason("heads unknown, projected jointly (galore.head_fallback: joint)", joint)
    # gates and routers are often smaller than the rank; for them the note in the start table is enough
    noted = [w for w in weights if w.note and not w.note.startswith(RANK_NOTE)]
    # once for each module: a parametrized weight has several parameters
    modules = dict.fromkeys((re.split(r"\.parametrizations\.|\.\w+$", w.name)[0], w.note) for w in noted)
    _warn_by_reason("targeted, but not projected", modules)
    groups = []
    for kind in ("projected", "plain"):
        for decay in (True, False):
            members = [w for w in weights if w.kind == kind and (w.name not in no_decay) == decay]
            if not members:
                continue
            group: dict[str, Any] = {
                "params": [w.parameter for w in members],
                "names": [w.name for w in members],
                "projected": kind == "projected",
                "lr": lr if kind == "projected" else lr * config.plain_lr_ratio,
                "weight_decay": weight_decay if decay else 0.0,
            }
            if kind == "projected":
                group["matrices"] = [list(w.matrices) for w in members]
                group["galore"] = config.trajectory()
            groups.append(group)
    return groups


def _warn_by_reason(what: str, reasons: Iterable[tuple[str, str]]) -> None:
    """Log one warning, on the first process, for weights that are not treated as a user would expect.

    Args:
        what: what happens to them.
        reasons: name and reason of each weight.
    """
    by_reason = defaultdict(list)
    for name, reason in reasons:
        by_reason[reason].append(name)
    if not by_reason or os.environ.get("RANK", "0") != "0":
        return
    lines = (
        f"{names[0]} ({reason})" if len(names) == 1 else f"{len(names)} modules such as {names[0]} ({reason})"
        for reason, names in by_reason.items()
    )
    logger.warning("%s: %s", what, "; ".join(lines))
