"""Triton kernels for the step of ``core/`` on many equal matrices in one launch, and for eigenvectors at a refresh.

The functions have the names of those in ``core/``, which define the results. One difference is allowed: factors are
rounded to bfloat16 where a model computes in it (``LocalWeight.compute_in`` in ``optim/local.py``). Weights, gradients
and moments are read and written at their addresses (``tables.py``) and are not joined or copied before a launch.

In docstrings ``matrices`` is the number of matrices of a launch. This module does not import Triton; the other modules
of this package do.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels on the CPU, as in tests without a GPU."""
DTYPES = (torch.float32, torch.bfloat16)
MIN_CAPABILITY = (8, 0)  # compute capability of the first tensor cores that multiply bfloat16


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def obstacle(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why the kernels cannot work on tensors of these dtypes on a device; None where they can."""
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
    """Why the kernels cannot work on a GPU; None where they can."""
    if torch.version.hip is not None:
        return "it lies on an AMD GPU"
    major, minor = torch.cuda.get_device_capability(device)
    too_old = (major, minor) < MIN_CAPABILITY
    return f"its GPU has compute capability {major}.{minor}, below 8.0" if too_old else None


@functools.cache
def has_warpgroups(device: torch.device) -> bool:
    """Whether four warps of a GPU multiply 64 rows together: Hopper and data-center Blackwell."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory for the tiles of a program; outside of CUDA the number of Hopper."""
    hopper, reserve = 227 << 10, 16 << 10  # the reserve is for what Triton takes besides the tiles
    if device.type != "cuda":
        return hopper - reserve
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"]) - reserve
