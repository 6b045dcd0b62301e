"""Does the host of a GPU stall? Gaps of a loop that does nothing, and of one that only launches tiny kernels.

A host that stalls raises the 99th percentile of every training step, whatever the step does.

    python benchmarks/stalls.py    # 12 s; the exit status is 1 from four gaps on
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable

import torch

GAP = 0.008  # seconds
MANY = 4  # gaps in all


def gaps(work: Callable[[], object], seconds: float) -> list[tuple[float, int]]:
    """The calls of ``work`` that took longer than ``GAP``: when (s) and how long (ms)."""
    long: list[tuple[float, int]] = []
    begin = last = time.perf_counter()
    while last < begin + seconds:
        work()
        now = time.perf_counter()
        if now - last > GAP:
            long.append((round(now - begin, 2), round(1e3 * (now - last))))
        last = now
    return long


def main() -> None:
    x, count = torch.zeros(16, device="cuda"), itertools.count(1)
    torch.cuda.synchronize()

    def launch() -> None:
        x.add_(1)
        if next(count) % 500 == 0:
            torch.cuda.synchronize()

    idle, launches = gaps(lambda: None, 4.0), gaps(launch, 8.0)
    print(f"gaps above {1e3 * GAP:.0f} ms (at s, ms): doing nothing {idle}, launching {launches}")
    sys.exit(len(idle) + len(launches) >= MANY)


if __name__ == "__main__":
    main()
