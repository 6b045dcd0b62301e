"""From a model to parameter groups: what is projected and how, what is plain, what is frozen, and why."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from galore_trainer.config import ALL_LINEAR, GaLoreConfig
from galore_trainer.core.galore import compute_dtype
from galore_trainer.core.heads import LogicalMatrix
from galore_trainer.core.precision import stored_basis_bytes, stored_bytes
from galore_trainer.errors import OptionError
from galore_trainer.optim.attention import heads_from_config, project_heads, role_of
from galore_trainer.optim.residual_state import has_residual, support_shape
from galore_trainer.optim.sides import project_whole
from galore_trainer.optim.streams import logical_name

POSITION_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter of the model and what happens to it.

    Attributes:
        name: logical name (wrapper prefixes dropped).
        parameter: the tensor itself.
        matrices: logical matrices where it is projected, else empty.
        note: why a targeted weight is not projected; else empty.
    """

    name: str
    parameter: nn.Parameter
    matrices: tuple[LogicalMatrix, ...] = ()
    note: str = ""

    @property
    def kind(self) -> str:
        """``projected``, ``plain`` or ``frozen``."""
        if not self.parameter.requires_grad:
            return "frozen"
        return "projected" if self.matrices else "plain"

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
            nothing left to project, heads or embeddings that are unknown.
    """
    candidates = _candidates(model)
    chosen = _targets(candidates, config)
    if config.embeddings != "plain":
        ends = _ends_of_model(model, config)
        if config.embeddings == "frozen":
            for end in ends.values():
                end.requires_grad_(False)
        else:
            candidates |= {name: _Candidate(name, _shape(end), False, False) for name, end in ends.items()}
            chosen |= ends.keys()
    ranks = _ranks(chosen, config)
    by_user = config.target_modules != ALL_LINEAR
    model_config = getattr(model, "config", None)
    heads, model_type = heads_from_config(model_config), getattr(model_config, "model_type", "")
    weights = []
    for full_name, parameter in model.named_parameters():
        name = logical_name(full_name)
        module_name = name.removesuffix(".weight")
        if not parameter.requires_grad or module_name not in chosen:
            weights.append(Weight(name, parameter))
            continue
        candidate = candidates[module_name]
        rank, named = ranks.get(module_name, (config.rank, by_user))
        smaller = min(candidate.shape[-2:])
        if rank > smaller and not named:
            weights.append(Weight(name, parameter, note=f"rank {rank} > smaller side {smaller}"))
            continue
        weights.append(Weight(name, parameter, tuple(_project(candidate, rank, config, heads, model_type))))
    if not any(w.matrices for w in weights):
        largest = max((min(candidates[c].shape[-2:]) for c in chosen), default=0)
        wanted = f"at most {largest}, the largest smaller side of any target" if largest else "a trainable target"
        raise OptionError("galore.rank", config.rank, wanted, "No weight would be projected.")
    with_heads = {role_of(w.name.removesuffix(".weight"), True) for w in weights if any(m.head_dim for m in w.matrices)}
    if config.share_output_heads and "o" not in with_heads:
        raise OptionError("galore.share_output_heads", True, "an output projection of attention that is known by name")
    if config.head_sharing != "joint" and heads is not None and not by_user and not with_heads:
        wanted = "q, k, v projections that are known by name (q_proj, query, qkv_proj, ...)"
        raise OptionError("galore.head_sharing", config.head_sharing, wanted, "Use head_sharing joint for this model.")
    return weights


@dataclasses.dataclass(frozen=True)
class _Candidate:
    name: str
    shape: tuple[int, ...]
    transposed: bool
    in_block: bool


def _project(
    candidate: _Candidate, rank: int, config: GaLoreConfig, heads: Any, model_type: str
) -> list[LogicalMatrix]:
    role = role_of(candidate.name, config.share_output_heads) if len(candidate.shape) == 2 else None
    if role is None or config.head_sharing == "joint":
        return [project_whole(candidate.shape, candidate.name, config, rank, candidate.transposed)]
    m, n = candidate.shape[::-1] if candidate.transposed else candidate.shape
    return project_heads(
        candidate.name, role, m, n, model_type=model_type, heads=heads, config=config, rank=rank,
        transposed=candidate.transposed,
    )  # fmt: skip


def _candidates(model: nn.Module) -> dict[str, _Candidate]:
    """Every weight that could be projected, by module name (a stack of experts: by parameter name)."""
    lists = [n for n, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    output_embeddings: Any = getattr(model, "get_output_embeddings", None)
    head = output_embeddings() if output_embeddings else None
    found = {}
    for module_name, module in model.named_modules():
        name = logical_name(module_name)
        in_block = (any(module_name.startswith(f"{n}.") for n in lists) or not lists) and module is not head
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            transposed = not isinstance(module, nn.Linear)
            weight: Any = module.weight
            found[name] = _Candidate(name, _shape(weight), transposed, in_block)
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and "expert" in f"{name}.{key}".lower():
                found[f"{name}.{key}"] = _Candidate(f"{name}.{key}", _shape(parameter), False, in_block)
    return found


def _ends_of_model(model: nn.Module, config: GaLoreConfig) -> dict[str, nn.Parameter]:
    """Weights of the input embeddings and the output layer by module name; one if they are tied."""
    getters: Any = [getattr(model, f"get_{end}_embeddings", None) for end in ("input", "output")]
    found = [module.weight for get in getters if get and (module := get()) is not None]
    if not found:
        wanted = "a transformers model, which tells its embeddings"
        raise OptionError("galore.embeddings", config.embeddings, wanted, "Freeze them by hand, or leave them plain.")
    named = {logical_name(name).removesuffix(".weight"): p for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if any(p is weight for weight in found)}


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
    return name == ending or name.endswith(f".{ending}")


def _regex_hit(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
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
            groups.append(group)
    return groups
