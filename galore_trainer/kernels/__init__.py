"""Triton kernels for the ordinary step, and for small eigenvectors at a refresh: what ``core/`` spells out, on many
equal matrices in one launch.

Names and results are those of ``core/``, which stays the truth, but that factors may be rounded to bfloat16 where a
model computes in it (``optim.stack.Job``). What differs is where things lie: weights, gradients and moments are read
and written at their addresses (``tables.py``), so nothing is joined or copied beforehand.
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
OLDEST = (8, 0)  # compute capability: tensor cores that multiply bfloat16


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
    if device.type == "cuda" and (why := _hardware(device)) is not None:
        return why
    other = [dtype for dtype in dtypes if dtype not in DTYPES]
    return f"{str(other[0]).removeprefix('torch.')} is neither float32 nor bfloat16" if other else None


@functools.cache
def _hardware(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "it lies on an AMD GPU"
    found = torch.cuda.get_device_capability(device)
    return f"its GPU has compute capability {found[0]}.{found[1]}, below 8.0" if found < OLDEST else None


@functools.cache
def in_groups(device: torch.device) -> bool:
    """Whether four warps multiply together there, 64 rows at a time (Hopper, and Blackwell but for its small GPUs)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take there, but for what no kernel here counts."""
    hopper, uncounted = 227 << 10, 16 << 10
    if device.type != "cuda":
        return hopper - uncounted
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"]) - uncounted
