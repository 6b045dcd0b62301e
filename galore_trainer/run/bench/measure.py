"""Timing of several methods that take turns in one process, and ratios of what was timed."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Step = Callable[[], Any]
WARM_UP = 3  # calls of each method that are not timed: bases, residuals, compilation


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of every call, and those that the host spent in it before the device was done."""

    ms: tuple[float, ...]
    host_ms: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.ms)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the calls took less, a quarter took more."""
        return quartiles(self.ms)

    def to_dict(self) -> dict[str, Any]:
        """Medians, quartiles and every sample."""
        low, high = self.quartiles
        host = statistics.median(self.host_ms)
        return {"ms": self.median, "low": low, "high": high, "host_ms": host, "samples": list(self.ms)}


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The values below and above which a quarter of them lie."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def timed(step: Step, device: torch.device) -> tuple[float, float]:
    """Milliseconds of one call on the device, and on the host."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        passed = 1e3 * (time.perf_counter() - start)
        return passed, passed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    start = time.perf_counter()
    step()
    host = 1e3 * (time.perf_counter() - start)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), host


def take_turns(methods: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Time every method once in each round."""
    for step in methods.values():
        for _ in range(WARM_UP):
            step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, step in methods.items():
            times[name].append(timed(step, device))
    return {name: Timing(*(tuple(x) for x in zip(*pairs, strict=True))) for name, pairs in times.items()}


def ratio(
    numerator: Timing, denominator: Timing | float, *, plus: float = 0.0, other_plus: float = 0.0
) -> dict[str, float]:
    """``ratio`` with the quartiles ``low`` and ``high`` of the rounds' own ratios.

    Args:
        numerator: above the line.
        denominator: below it; a plain number of milliseconds has no spread.
        plus, other_plus: milliseconds that are added to each call.
    """
    below = [denominator] * len(numerator.ms) if isinstance(denominator, float) else denominator.ms
    ratios = [(a + plus) / (b + other_plus) for a, b in zip(numerator.ms, below, strict=True)]
    low, high = quartiles(ratios)
    return {"ratio": statistics.median(ratios), "low": low, "high": high}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes that a plain copy moves in a second, those read and those written counted; of random numbers."""
    size = 1 << (31 if device.type == "cuda" else 24)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = take_turns({"copy": lambda: target.copy_(source)}, 12, device)["copy"]
    return 2e3 * size / timing.median


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]
