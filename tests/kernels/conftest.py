"""The kernels on a GPU where there is one, else as Triton interprets them; what they allocate is full of NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated and not written shows."""
    for name in ("empty", "empty_like"):

        def make(*args: Any, original: Any = getattr(torch, name), **kwargs: Any) -> torch.Tensor:
            made = original(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, make)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
