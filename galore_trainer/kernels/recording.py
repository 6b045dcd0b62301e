"""Launches of a step, recorded once as a CUDA graph and made again by one call.

A small model's step is some thirty launches, which take the host longer than they take the GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MOST_BYTES = 192 << 20  # of what a recorded step makes, which stays allocated


class Recording:
    """A recorded step.

    Args:
        launch: makes the launches on the current stream. It has run before, with the same kernels, and waits for
            nothing. What changes from step to step it reads on the device.
    """

    def __init__(self, launch: Callable[[], Tensor]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads go on to allocate pinned memory and to ask for events, as data loaders and NCCL do.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._made = launch()

    def repeat(self) -> Tensor:
        """Make the launches; what the last one returned, which the next call overwrites."""
        self._graph.replay()
        return self._made
