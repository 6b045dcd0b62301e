"""PyTorch's inputs for tests of any optimizer, and ``GaLoreAdamW`` in the three forms that those tests run on."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch.nn import Parameter

from galore_trainer.config import GaLoreConfig
from galore_trainer.optim.galore_adamw import GaLoreAdamW

METHOD: dict[str, Any] = {"rank": 2, "update_proj_gap": 3, "residual_warmup_steps": 2, "scale": 1.0}
FORMS = {
    "plain": GaLoreConfig(**METHOD),
    "projected": GaLoreConfig(**METHOD, residual_percent=0.0),
    "residual": GaLoreConfig(**METHOD, residual_percent=20.0),
}
"""``plain`` projects nothing: it is AdamW. The others project what has two dimensions."""

REFERENCE = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0, foreach=False, fused=False)
every_form = pytest.mark.parametrize("form", FORMS)


def torch_inputs() -> ModuleType:
    """``torch.testing._internal.common_optimizers``.

    It imports all of torch's test machinery, which takes seconds, sets global flags and needs more packages. Its inputs
    need none of that, so stand-ins take its place.
    """
    names = ("common_device_type", "common_methods_invocations", "common_utils")
    unused = MagicMock(_TestParametrizer=object, TEST_WITH_TORCHDYNAMO=False)
    with patch.dict(sys.modules, {f"torch.testing._internal.{name}": unused for name in names}):
        return importlib.import_module("torch.testing._internal.common_optimizers")


def make(form: str, params: Iterable[Any], **options: Any) -> GaLoreAdamW:
    """An optimizer of one form.

    Args:
        form: one of ``FORMS``.
        params: tensors, or pairs of a name and a tensor.
        options: as for torch's AdamW; ``seed`` and ``config`` too.
    """
    options = {"config": FORMS[form], "lr": 1e-2, **options}
    return quietly(group_by_form(form, params), **options)


def quietly(params: Any, config: GaLoreConfig | None = None, **options: Any) -> GaLoreAdamW:
    """``GaLoreAdamW(...)``, which warns where it projects nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*projects nothing")
        return GaLoreAdamW(params, config, **options)


def group_by_form(form: str, params: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameter groups: one of a plain form, else one of matrices and one of the rest, where there are any."""
    params = list(params)
    if form == "plain":
        return [{"params": params}]
    flat = [(p[1] if isinstance(p, tuple) else p).dim() == 2 for p in params]
    groups = [
        {"params": [p for p, matrix in zip(params, flat, strict=True) if matrix], "projected": True},
        {"params": [p for p, matrix in zip(params, flat, strict=True) if not matrix]},
    ]
    return [group for group in groups if group["params"]]


def weights(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Two matrices and a vector; equal numbers at every call."""
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((6, 4), (4, 5), (4,))]


def train(params: Sequence[torch.Tensor], optimizer: Any, steps: Iterable[int]) -> None:
    """Steps with random gradients, each decided by its number."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def same(one: Any, other: Any) -> bool:
    """Whether two nests of dictionaries and lists hold equal keys, numbers and tensors, of equal dtypes."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
