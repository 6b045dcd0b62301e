"""From a model to parameter groups: what is projected and how, what is plain, what is frozen, and why."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, type_before_parametrizations

from galore_trainer.config import ALL_LINEAR, GaLoreConfig
from galore_trainer.core.galore import compute_dtype
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.core.precision import stored_basis_bytes, stored_bytes
from galore_trainer.errors import OptionError
from galore_trainer.targets.causes import adapters_alone, nothing_projected
from galore_trainer.targets.computed import COMPUTED, WHOLE_AGAIN, check_not_lazy, computed_weight, sources_of
from galore_trainer.targets.geometry import heads_of
from galore_trainer.targets.matrices import (
    HeadsDoNotFit,
    has_residual,
    project_heads,
    project_whole,
    support_shape,
    unknown_heads,
)
from galore_trainer.targets.names import logical_name, module_of, projection_name, role_of, should_have_heads

logger = logging.getLogger(__name__)
POSITION_BYTES = 4
RANK_NOTE = "rank"  # begins the note of a weight that is smaller than its rank


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter of the model and what happens to it.

    Attributes:
        name: logical name (wrapper prefixes dropped).
        parameter: the tensor itself.
        matrices: logical matrices where it is projected, else empty.
        note: why a targeted weight is not projected; else empty.
        why_joint: why its heads play no part, where its name promises heads; else empty.
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
        """Whether it is projected jointly although it is an attention weight that should share bases by head."""
        should = config.head_sharing != "joint" and should_have_heads(module_of(self.name), config.share_output_heads)
        return should and bool(self.matrices) and not any(m.head_dim for m in self.matrices)

    def state_bytes(self, config: GaLoreConfig) -> dict[str, int]:
        """Bytes of optimizer state by kind, before any step (residual: after its warm-up); counters are left out."""
        found = {"basis": 0, "moments": 0, "residual": 0, "plain": 0}
        wide = compute_dtype(self.parameter.dtype)
        for matrix in self.matrices:
            found["basis"] += stored_basis_bytes(matrix.basis_shape, config.basis_bits, wide)
            found["moments"] += 2 * stored_bytes(matrix.moment_shape, config.state_bits, wide)
            if has_residual(matrix, config):
                shape = support_shape(matrix, config)
                moments = 2 * stored_bytes(shape, config.state_bits, wide)
                found["residual"] += POSITION_BYTES * math.prod(shape) + moments
        if self.kind == "plain":
            found["plain"] = 2 * stored_bytes((1, self.parameter.numel()), config.plain_state_bits, wide)
        return found


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
    candidates = _candidates(model)
    chosen = _targets(candidates, config)
    if config.embeddings != "plain":
        ends = _ends_of_model(model, config)
        if config.embeddings == "frozen":
            for end in ends.values():
                end.requires_grad_(False)
        else:
            candidates |= {name: _Candidate(name, (end,), False, False) for name, end in ends.items()}
            chosen |= ends.keys()
    ranks = _ranks(chosen, config)
    by_user = config.target_modules != ALL_LINEAR
    targets = {id(p): c for name, c in reversed(candidates.items()) if name in chosen for p in c.parameters}
    weights: list[Weight] = []
    small: dict[str, int] = {}
    for full_name, parameter in model.named_parameters():
        name = logical_name(full_name)
        own = candidates[module_of(name)] if module_of(name) in chosen else None
        candidate = own or targets.get(id(parameter))
        if not parameter.requires_grad or candidate is None:
            weights.append(Weight(name, parameter))
            continue
        rank, named = ranks.get(candidate.name, (config.rank, by_user))
        if candidate.computed and named:
            raise computed_weight(candidate.name, name, in_pattern=not by_user)
        smaller = min(_shape(parameter)[-2:], default=0)
        note = ""
        if candidate.computed:
            note = COMPUTED
        elif own is None and not named:
            note = f"tied to {candidate.name}"  # embeddings, for example, which all-linear leaves alone
        elif rank > smaller and not named:
            note = f"{RANK_NOTE} {rank} > smaller side {smaller}"
            small[name] = smaller
        if note:
            weights.append(Weight(name, parameter, note=note))
            continue
        matrices, why_joint = _project(candidate, rank, config)
        weights.append(Weight(name, parameter, tuple(matrices), why_joint=why_joint))
    if not any(w.matrices for w in weights):
        raise nothing_projected(model, config, small, bool(chosen), any(w.note == COMPUTED for w in weights))
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
    if not joint and (error := adapters_alone(model, [w.name for w in weights if w.matrices])):
        raise error


@dataclasses.dataclass(frozen=True)
class _Candidate:
    name: str
    parameters: tuple[nn.Parameter, ...]  # the weight, or what it is computed from
    transposed: bool
    in_block: bool
    around: tuple[nn.Module, ...] = ()  # the modules that hold it, from its attention to the model
    computed: bool = False  # it is no parameter itself: weight norm, pruning


def _project(candidate: _Candidate, rank: int, config: GaLoreConfig) -> tuple[list[LogicalMatrix], str]:
    """The logical matrices of a weight, and why its heads play no part where they should."""
    name, shape, transposed = candidate.name, _shape(candidate.parameters[0]), candidate.transposed
    may_share = config.head_sharing != "joint" and len(shape) == 2
    role = role_of(name, config.share_output_heads) if may_share else None
    if role is None:
        unknown = may_share and should_have_heads(name, config.share_output_heads)
        reason = "no layout of heads is known by its name" if unknown else ""
        return [project_whole(shape, name, config, rank, transposed)], reason
    m, n = shape[::-1] if transposed else shape
    model_config = next((c for module in candidate.around if (c := getattr(module, "config", None)) is not None), None)
    try:
        matrices = project_heads(
            name, role, m, n, model_type=getattr(model_config, "model_type", ""),
            heads=heads_of(name, next(iter(candidate.around), None), model_config), config=config, rank=rank,
            transposed=transposed,
        )  # fmt: skip
    except HeadsDoNotFit as error:
        if config.head_fallback == "refuse":
            raise
        return [project_whole(shape, name, config, rank, transposed)], error.reason
    return matrices, ""


def _candidates(model: nn.Module) -> dict[str, _Candidate]:
    """Every weight that could be projected, by module name (a stack of experts: by parameter name)."""
    # a ParametrizationList is a ModuleList, but no list of blocks
    kinds = [(n, module) for n, module in model.named_modules() if not isinstance(module, ParametrizationList)]
    lists = [n for n, module in kinds if isinstance(module, nn.ModuleList)]
    output_embeddings: Any = getattr(model, "get_output_embeddings", None)
    head = output_embeddings() if output_embeddings else None
    modules = dict(model.named_modules())
    found = {}
    for module_name, module in modules.items():
        name = logical_name(module_name)
        in_block = (any(module_name.startswith(f"{n}.") for n in lists) or not lists) and module is not head
        if isinstance(module, nn.Linear) or type_before_parametrizations(module).__name__ == "Conv1D":
            transposed = not isinstance(module, nn.Linear)
            around = tuple(modules[outer] for outer in _outer_names(projection_name(module_name)))
            sources, computed = sources_of(module, "weight")
            found[name] = _Candidate(name, sources, transposed, in_block, around or (model,), computed)
        own = () if isinstance(module, ParametrizationList) else module.named_parameters(recurse=False)
        for key, parameter in own:
            if parameter.dim() == 3 and "expert" in f"{name}.{key}".lower():
                found[f"{name}.{key}"] = _Candidate(f"{name}.{key}", (parameter,), False, in_block)
        for key in module.parametrizations if is_parametrized(module) else ():
            if "expert" in f"{name}.{key}".lower() and getattr(module, key).dim() == 3:
                sources, computed = sources_of(module, key)
                found[f"{name}.{key}"] = _Candidate(f"{name}.{key}", sources, False, in_block, computed=computed)
    return found


def _outer_names(name: str) -> Iterator[str]:
    """Names of the modules around one, from the innermost to the model's own, which is empty."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _ends_of_model(model: nn.Module, config: GaLoreConfig) -> dict[str, nn.Parameter]:
    """Weights of the input embeddings and the output layer by module name; one if they are tied."""
    getters: Any = [getattr(model, f"get_{end}_embeddings", None) for end in ("input", "output")]
    ends = [module for get in getters if get and (module := get()) is not None]
    if not ends:
        wanted = "a transformers model, which tells its embeddings"
        raise OptionError("galore.embeddings", config.embeddings, wanted, "Freeze them by hand, or leave them plain.")
    if any(sources_of(end, "weight")[1] for end in ends):
        got = f"{config.embeddings}, of which a weight is {COMPUTED}"
        raise OptionError("galore.embeddings", got, "weights that are parameters", WHOLE_AGAIN)
    named = {logical_name(name).removesuffix(".weight"): p for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if any(p is end.weight for end in ends)}


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _targets(candidates: dict[str, _Candidate], config: GaLoreConfig) -> set[str]:
    targets = config.target_modules
    if targets == ALL_LINEAR:
        return {name for name, c in candidates.items() if c.in_block}
    patterns = [targets] if isinstance(targets, str) else targets
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {n for n in candidates if (_regex_hit(pattern, n) if isinstance(targets, str) else _ends(pattern, n))}
        if not hits:
            leaves = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in candidates}))
            wanted = f"a regex or name endings that match linear layers ({leaves})"
            raise OptionError("galore.target_modules", pattern, wanted, "A regex must match the whole module name.")
        chosen |= hits
    return chosen


def _ranks(chosen: Collection[str], config: GaLoreConfig) -> dict[str, tuple[int, bool]]:
    ranks: dict[str, tuple[int, bool]] = {}
    for pattern, rank in config.rank_pattern.items():
        hits = [n for n in chosen if _ends(pattern, n) or _regex_hit(f"(.*\\.)?({pattern})", n)]
        if not hits:
            raise OptionError(f"galore.rank_pattern[{pattern!r}]", rank, "a pattern that matches a targeted module")
        ranks.update((name, (rank, True)) for name in hits if name not in ranks)
    return ranks


def _ends(ending: str, name: str) -> bool:
    return any(f".{form}".endswith(f".{ending}") for form in (name, projection_name(name)))


def _regex_hit(pattern: str, name: str) -> bool:
    try:
        return any(re.fullmatch(pattern, form) for form in (name, projection_name(name)))
    except re.error as error:
        raise OptionError("galore.target_modules", pattern, f"a valid regular expression ({error})") from None


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
    _tell("heads unknown, projected jointly (galore.head_fallback: joint)", joint)
    # gates and routers are often smaller than the rank: the table says so, which is enough
    noted = [w for w in weights if w.note and not w.note.startswith(RANK_NOTE)]
    modules = dict.fromkeys((re.split(r"\.parametrizations\.|\.\w+$", w.name)[0], w.note) for w in noted)
    _tell("targeted, but not projected", modules)
    groups, settings = [], config.to_dict()
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
                group["galore"] = {key: settings[key] for key in GaLoreConfig.trajectory_fields()}
            groups.append(group)
    return groups


def _tell(what: str, reasons: Iterable[tuple[str, str]]) -> None:
    """One warning for weights that are not treated as was to be expected.

    Args:
        what: what happens to them.
        reasons: name and reason of each.
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
