"""Figures of a run's optimizer and model: bytes of state by kind, projection error, seconds by part, parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from galore_trainer.optim.galore_adamw import GaLoreAdamW


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def parameter_counts(model: Any) -> dict[str, int]:
    """Elements that are ``trained``, and the ``total`` with what is frozen; tied weights count once."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]  # ds_: ZeRO-3's
    return {"trained": sum(n for n, trained in sizes if trained), "total": sum(n for n, _ in sizes)}


def optimizer_seconds(optimizer: Any, part: str) -> float:
    """Seconds that a part of its steps (``refresh``, ``diagnosis``) took; 0 for an optimizer that has none."""
    stopwatch = getattr(unwrapped(optimizer), "stopwatch", None)
    return float(stopwatch.seconds().get(part, 0.0)) if stopwatch else 0.0


def optimizer_figures(optimizer: Any) -> dict[str, Any]:
    """``optimizer_state_bytes`` by kind for any optimizer; of ours ``skipped_steps`` and ``projection_error`` too."""
    inner = unwrapped(optimizer)
    if not isinstance(inner, GaLoreAdamW):
        return {"optimizer_state_bytes": state_bytes(inner)}
    return {
        "optimizer_state_bytes": inner.state_bytes(),
        "skipped_steps": inner.check_finite(),
        "projection_error": inner.projection_report(),
    }


def state_bytes(optimizer: Any) -> dict[str, int]:
    """Bytes of any optimizer's state: ``plain``, and for galore-torch's projected groups ``basis`` and ``moments``.

    A tensor that several parameters share, such as the code book of bitsandbytes, counts once.
    """
    kinds: dict[str, int] = {}
    counted = set()
    projected = {id(p) for g in (optimizer.param_groups if optimizer else ()) if "rank" in g for p in g["params"]}
    for p, state in optimizer.state.items() if optimizer else ():  # ZeRO-3 empties groups between steps
        for value in state.values():
            kind = "plain" if id(p) not in projected else "moments" if torch.is_tensor(value) else "basis"
            for tensor in _tensors(value):
                if tensor.data_ptr() not in counted:
                    counted.add(tensor.data_ptr())
                    kinds[kind] = kinds.get(kind, 0) + tensor.numel() * tensor.element_size()
    return kinds or {"plain": 0}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of one entry: itself, or those of a projector's ``ortho_matrix``."""
    value = getattr(value, "ortho_matrix", value)
    yield from (v for v in (value if isinstance(value, list) else [value]) if torch.is_tensor(v))
