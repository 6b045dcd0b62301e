"""Why nothing of a model would be projected: adapters, quantised weights, frozen weights, or a rank too large."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.targets.computed import COMPUTED, WHOLE_AGAIN
from galore_trainer.targets.names import logical_name

PACKED = ("qweight", "qzeros", "weight_packed")  # buffers of GPTQ, AWQ and compressed-tensors layers
WANTED = "linear layers of the model itself that train"
"""What is wanted instead, in the errors below."""


def nothing_projected(
    model: nn.Module, config: GaLoreConfig, smaller_sides: Mapping[str, int], any_target: bool, any_computed: bool
) -> OptionError:
    """The error for a model of which no weight would be projected.

    Args:
        model: the model that was planned.
        config: gives the rank.
        smaller_sides: the smaller side of every target that trains and is too small for its rank, by parameter name.
        any_target: whether target_modules matches anything, whether it trains or not.
        any_computed: whether a target that trains has a weight that is no parameter.
    """
    adapters = _adapters(model)
    # adapters are small by design: a lower rank is not the way out for them
    sides = [side for name, side in smaller_sides.items() if name not in adapters]
    if sides:
        wanted = f"at most {max(sides)}, the largest smaller side of any target that trains"
        return OptionError("galore.rank", config.rank, wanted, "No weight would be projected.")
    if any_computed:
        return OptionError("model", f"weights that are {COMPUTED} in all targets that train", WANTED, WHOLE_AGAIN)
    if adapters:
        return _only_adapters(model)
    if kind := _quantized(model):
        got = f"weights quantised by {kind}, which do not train"
        return OptionError("model", got, WANTED, "Load it without quantization_config, for example in bfloat16.")
    if not any(p.requires_grad for p in model.parameters()):
        got = "a model whose parameters are all frozen"
    elif any_target:
        got = "frozen weights in all of target_modules"
    else:
        return OptionError("model", "no linear layer in a block", WANTED, "Train this model with AdamW.")
    way_out = "Call requires_grad_() on what is to train before the optimizer is built, or choose other target_modules."
    return OptionError("model", got, WANTED, way_out)


def adapters_alone(model: nn.Module, projected: Collection[str]) -> OptionError | None:
    """The error for a model of which only adapters would be projected; None where other weights are projected too.

    Args:
        model: the model that was planned.
        projected: names of the parameters that would be projected.
    """
    return _only_adapters(model) if set(projected) <= _adapters(model) else None


def _only_adapters(model: nn.Module) -> OptionError:
    kind = _quantized(model)
    got = "adapters (peft) over frozen weights" + (f", quantised by {kind}" if kind else "")
    way_out = (
        "Pass the model without adapters, or train them with AdamW (galore-ft train --method lora). To project the "
        "adapters themselves, name them in target_modules, with a rank that fits them."
    )
    return OptionError("model", got, WANTED, way_out)


def _adapters(model: nn.Module) -> set[str]:
    """Names of trainable parameters of peft: those of adapters beside the layers they wrap, and prompt encoders."""
    trainable = {logical_name(name) for name, p in model.named_parameters() if p.requires_grad}
    wrapped = [logical_name(name) for name, module in model.named_modules() if hasattr(module, "base_layer")]
    beside_layers = {
        name
        for name in trainable
        if any(name.startswith(f"{layer}.") and not name.startswith(f"{layer}.base_layer.") for layer in wrapped)
    }
    return beside_layers | {name for name in trainable if name.startswith("prompt_encoder.")}


def _quantized(model: nn.Module) -> str:
    """The method that quantised the weights of a model, or the type of such weights; empty where none are quantised."""
    settings: Any = getattr(getattr(model, "config", None), "quantization_config", None) or {}
    settings = settings if isinstance(settings, Mapping) else vars(settings)
    method = settings.get("quant_method")
    if method and not settings.get("dequantize"):  # with dequantize, loading has turned them back into floats
        return str(getattr(method, "value", method))
    for p in model.parameters():
        if hasattr(p, "quant_state") or p.dtype.itemsize == 1:  # bitsandbytes, or int8 and float8 weights
            return f"{type(p).__name__} ({str(p.dtype).removeprefix('torch.')})"
    return "packed buffers" if any(name.rsplit(".", 1)[-1] in PACKED for name, _ in model.named_buffers()) else ""
