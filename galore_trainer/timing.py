"""Seconds spent in named parts of a step: device events on CUDA, the wall clock elsewhere; never waits by itself."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Iterator

import torch

OPEN_EVENTS = 1024  # kept before those that are done are read


class Stopwatch:
    """Adds up seconds by name; CUDA events are read only when ``seconds`` is asked for."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def measure(self, name: str, device: torch.device) -> Iterator[None]:
        """Add the time of the enclosed block on ``device`` to ``name``."""
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(torch.cuda.current_stream(device))
            yield
            end.record(torch.cuda.current_stream(device))
            self._events.append((name, begin, end))
            if len(self._events) > OPEN_EVENTS:
                self._collect(wait=False)
        else:
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Seconds by name since the start; waits for the device where events are open."""
        self._collect(wait=True)
        return dict(self._seconds)

    def _collect(self, wait: bool) -> None:
        """Read events in their order: all of them, or those the device has passed."""
        while self._events:
            name, begin, end = self._events[0]
            if wait:
                end.synchronize()
            elif not end.query():
                return
            self._seconds[name] += begin.elapsed_time(end) / 1000.0
            self._events.popleft()
