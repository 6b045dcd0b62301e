"""Candidates: the weights of a model that could be projected, and those among them that the settings choose."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, type_before_parametrizations

from galore_trainer.config import ALL_LINEAR, GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.targets.computed import COMPUTED, WHOLE_AGAIN, sources_of
from galore_trainer.targets.names import logical_name, module_of, projection_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A weight that could be projected.

    Attributes:
        name: logical name of its module; that of the parameter for a stack of experts.
        parameters: the weight itself, or the parameters that it is computed from.
        transposed: the weight is stored as [in_features, out_features].
        in_block: ``all-linear`` chooses it: it lies in a list of blocks, or the model has no such list.
        around: the modules that contain it, from its attention to the model.
        computed: the weight is no parameter itself (weight norm, pruning), so it cannot be projected.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    transposed: bool = False
    in_block: bool = False
    around: tuple[nn.Module, ...] = ()
    computed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) parameter."""
        return whole_shape(self.parameters[0])


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of a parameter; under ZeRO-3, which leaves an empty tensor in its place, the shape it had before."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def find_candidates(model: nn.Module) -> dict[str, Candidate]:
    """The weights of linear layers (and ``Conv1D``) and the stacks of experts, by ``Candidate.name``."""
    modules = dict(model.named_modules())
    # a ParametrizationList is an nn.ModuleList, but no list of blocks
    block_lists = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and not isinstance(module, ParametrizationList)
    ]
    get_output_layer: Any = getattr(model, "get_output_embeddings", None)
    output_layer = get_output_layer() if get_output_layer else None
    candidates: dict[str, Candidate] = {}
    for full_name, module in modules.items():
        name = logical_name(full_name)
        in_list = any(full_name.startswith(f"{blocks}.") for blocks in block_lists)
        in_block = (in_list or not block_lists) and module is not output_layer
        if isinstance(module, nn.Linear) or type_before_parametrizations(module).__name__ == "Conv1D":
            sources, computed = sources_of(module, "weight")
            candidates[name] = Candidate(
                name=name,
                parameters=sources,
                transposed=not isinstance(module, nn.Linear),  # Conv1D stores [in_features, out_features]
                in_block=in_block,
                # nothing is around a layer that is the whole model, so its config is looked for in itself
                around=tuple(modules[outer] for outer in _outer_names(projection_name(full_name))) or (model,),
                computed=computed,
            )
        for expert_name, sources, computed in _expert_stacks(name, module):
            candidates[expert_name] = Candidate(
                name=expert_name, parameters=sources, in_block=in_block, computed=computed
            )
    return candidates


def _expert_stacks(module_name: str, module: nn.Module) -> Iterator[tuple[str, tuple[nn.Parameter, ...], bool]]:
    """Name, parameters and ``computed`` of each stack of experts [experts, m, n] that a module holds itself."""
    if isinstance(module, ParametrizationList):  # its parameters are parts of a weight, not weights
        return
    for key, parameter in module.named_parameters(recurse=False):
        name = f"{module_name}.{key}"
        if parameter.dim() == 3 and "expert" in name.lower():
            yield name, (parameter,), False
    parametrized: Any = module.parametrizations if is_parametrized(module) else ()
    for key in parametrized:
        name = f"{module_name}.{key}"
        # the name comes first: reading a parametrized weight computes it, and spectral norm changes its buffers then
        if "expert" in name.lower() and getattr(module, key).dim() == 3:
            yield name, *sources_of(module, key)


def _outer_names(name: str) -> Iterator[str]:
    """Names of the modules around a module, from the innermost to the model's name, which is empty."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def embedding_weights(model: nn.Module, config: GaLoreConfig) -> dict[str, nn.Parameter]:
    """Weights of the input embeddings and of the output layer by module name; one entry where they are tied.

    Raises:
        OptionError: the model does not say what its embeddings are, or one of the weights is computed.
    """
    getters: Any = [getattr(model, f"get_{end}_embeddings", None) for end in ("input", "output")]
    modules = [module for get in getters if get and (module := get()) is not None]
    if not modules:
        wanted = "a transformers model, which tells its embeddings"
        raise OptionError("galore.embeddings", config.embeddings, wanted, "Freeze them by hand, or leave them plain.")
    if any(sources_of(module, "weight")[1] for module in modules):
        got = f"{config.embeddings}, of which a weight is {COMPUTED}"
        raise OptionError("galore.embeddings", got, "weights that are parameters", WHOLE_AGAIN)
    named = {module_of(logical_name(name)): p for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if any(p is module.weight for module in modules)}


def choose_targets(candidates: Mapping[str, Candidate], config: GaLoreConfig) -> tuple[set[str], bool]:
    """Names of the candidates that ``target_modules`` chooses, and whether it names them one by one.

    One text is a regular expression for the whole name. A list whose every entry ends some module's name holds name
    endings, as in peft. Any other list is read as transformers reads ``optim_target_modules``: an entry is a part of a
    name, or a regular expression for the whole name. ``all-linear`` and parts of names choose without naming.

    Raises:
        OptionError: an entry without a match, an entry that could mean two things, or an invalid regular expression.
    """
    patterns = config.target_modules
    if patterns == ALL_LINEAR:
        return {name for name, candidate in candidates.items() if candidate.in_block}, False
    if isinstance(patterns, str):
        hits = {name for name in candidates if _matches_regex(patterns, name)}
        if not hits:
            raise _no_match(patterns, candidates, "A regex must match the whole module name.")
        return hits, True
    endings = {pattern: {name for name in candidates if _has_ending(pattern, name)} for pattern in patterns}
    if all(endings.values()):
        return set().union(*endings.values()), True
    targets: set[str] = set()
    for pattern, ended in endings.items():
        parts = {name for name in candidates if pattern in name}
        if ended and ended != parts:
            raise _ambiguous(pattern, ended, parts)
        if cut := {name for name in parts if not _cuts_no_number(pattern, name)}:
            got = f"{pattern!r}, which is also a part of {min(cut)}"
            way_out = "Write the character that follows the number, too, for example 'layers.1.'."
            raise OptionError("galore.target_modules", got, "a part of names that cuts no number in two", way_out)
        if not parts and not any(_matches_regex(pattern, name) for name in candidates):
            raise _no_match(pattern, candidates, "")
        targets |= parts | {name for name in candidates if not parts and _matches_regex(pattern, name)}
    return targets, False


def _no_match(pattern: str, candidates: Mapping[str, Candidate], way_out: str) -> OptionError:
    leaves = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in candidates}))
    wanted = f"a regex, name endings or parts of names that match linear layers ({leaves})"
    if any(pattern in name for name in candidates):
        way_out += f" A part of names stands in a list: [{pattern}]."
    return OptionError("galore.target_modules", pattern, wanted, way_out)


def _ambiguous(pattern: str, endings: Collection[str], parts: Collection[str]) -> OptionError:
    """The error for an entry that is a name ending to peft and a part of more names to transformers."""
    more = min(set(parts) - set(endings))
    got = f"{pattern!r}, the ending of {len(endings)} names and a part of {len(parts)}, such as {more}"
    text = re.escape(pattern)
    way_out = f"Write a regex: '(.*\\.)?{text}' for the endings, '.*{text}.*' for the parts."
    return OptionError("galore.target_modules", got, "an entry with one meaning", way_out)


def _cuts_no_number(part: str, name: str) -> bool:
    """Whether a part occurs in a name without cutting a number: ``layers.1`` in ``layers.10`` cuts one."""
    before, after = (r"(?<!\d)" if part[0].isdigit() else ""), (r"(?!\d)" if part[-1].isdigit() else "")
    return re.search(before + re.escape(part) + after, name) is not None


def ranks_by_pattern(targets: Collection[str], config: GaLoreConfig) -> dict[str, int]:
    """Ranks that ``rank_pattern`` gives to targets, by target; of several patterns that match the first one counts.

    Raises:
        OptionError: a pattern that matches no target.
    """
    ranks: dict[str, int] = {}
    for pattern, rank in config.rank_pattern.items():
        hits = [n for n in targets if _has_ending(pattern, n) or _matches_regex(f"(.*\\.)?({pattern})", n)]
        if not hits:
            raise OptionError(f"galore.rank_pattern[{pattern!r}]", rank, "a pattern that matches a targeted module")
        for name in hits:
            ranks.setdefault(name, rank)
    return ranks


def _has_ending(ending: str, name: str) -> bool:
    return any(f".{form}".endswith(f".{ending}") for form in (name, projection_name(name)))


def _matches_regex(pattern: str, name: str) -> bool:
    try:
        return any(re.fullmatch(pattern, form) for form in (name, projection_name(name)))
    except re.error as error:
        raise OptionError("galore.target_modules", pattern, f"a valid regular expression ({error})") from None
