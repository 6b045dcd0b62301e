"""Triton kernels for the ordinary step: what ``core/`` spells out, on many equal matrices in one launch.

Names and results are those of ``core/``, which stays the truth. What differs is where things lie: weights, gradients
and moments are read and written at their addresses (``tables.py``), so nothing is joined or copied beforehand.
Triton is imported with the modules below, not with this one.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels on the CPU, as the tests do where there is no GPU."""
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def obstacle(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why the kernels cannot work on tensors of these dtypes there; None where they can."""
    if not installed():
        return "Triton is not installed"
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"it lies on {device.type}"
    other = [dtype for dtype in dtypes if dtype not in DTYPES]
    return f"{str(other[0]).removeprefix('torch.')} is neither float32 nor bfloat16" if other else None
