"""Weights that cannot be projected because they are computed from parameters or have no shape yet.

torch computes a weight in every forward pass where it is parametrized, weight-normed, spectral-normed or pruned.
"""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from galore_trainer.errors import OptionError
from galore_trainer.targets.names import logical_name

COMPUTED = "computed from other parameters"
WHOLE_AGAIN = (
    "Call torch.nn.utils.parametrize.remove_parametrizations (remove_weight_norm, remove_spectral_norm or prune.remove "
    "for the hooks of torch.nn.utils) before the optimizer is built."
)


def sources_of(module: nn.Module, key: str) -> tuple[tuple[nn.Parameter, ...], bool]:
    """The parameters of a weight, and whether it is computed from them in every forward pass.

    Args:
        module: a layer.
        key: name of the weight in the layer.

    Returns:
        The weight itself and False; or the parameters that it is computed from and True. A weight that is a buffer has
        no parameters.
    """
    if is_parametrized(module, key):
        return tuple(module.parametrizations[key].parameters()), True  # type: ignore[union-attr, index]
    weight = getattr(module, key, None)
    if isinstance(weight, nn.Parameter) or key in module._buffers:
        return (weight,) if isinstance(weight, nn.Parameter) else (), False
    # neither parameter nor buffer: a hook of torch.nn.utils computes it from the layer's parameters other than the bias
    sources = tuple(p for name, p in module.named_parameters() if "bias" not in name.split("."))
    return sources, bool(sources)


def computed_weight(module: str, source: str, *, in_pattern: bool) -> OptionError:
    """The error for a module that the user named and whose weight is computed.

    Args:
        module: its name.
        source: name of one of the parameters that its weight is computed from.
        in_pattern: whether the user named it in ``rank_pattern``, not in ``target_modules``.
    """
    option = "galore.rank_pattern" if in_pattern else "galore.target_modules"
    got = f"{module}, whose weight is {COMPUTED} ({source})"
    way_out = f"{WHOLE_AGAIN} Or leave the module out of {option.removeprefix('galore.')}."
    return OptionError(option, got, "modules whose weight is a parameter", way_out)


def check_not_lazy(model: nn.Module) -> None:
    """Raise ``OptionError`` for a parameter of a lazy layer, which has no shape before the first forward pass."""
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter):
            got = f"{logical_name(name)}, of a lazy layer that has no shape yet"
            raise OptionError("model", got, "weights with shapes", "Run one batch before the optimizer is built.")
