"""Peak memory of a run: what the device's allocator saw, or on a CPU how far the process grew."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch


class PeakMemory:
    """Measures from construction on.

    On CUDA the peak is the allocator's, weights included. On a CPU it is the peak resident size above the size at
    construction (with the model loaded), as far as the system tells.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):  # resets the peak; without it the peak of loading would count
                Path("/proc/self/clear_refs").write_text("5")
            self._base = _status("VmRSS")

    def report(self) -> dict[str, Any]:
        """``peak_bytes`` (None where the system does not tell) and ``meaning``."""
        if self.device.type == "cuda":
            return {
                "peak_bytes": torch.cuda.max_memory_allocated(self.device),
                "meaning": "allocated on the device, weights included",
            }
        peak = _status("VmHWM")
        grown = peak - self._base if peak is not None and self._base is not None else None
        return {"peak_bytes": grown, "meaning": "resident memory above that of the loaded model"}


def _status(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
