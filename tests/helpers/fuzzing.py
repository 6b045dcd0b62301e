"""Properties with few examples in an ordinary run; ``FUZZ_SECONDS=60`` goes on with new ones for as long, each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from hypothesis import HealthCheck, settings

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
FUZZ = settings(
    deadline=None,
    max_examples=200 if SECONDS else 12,
    derandomize=not SECONDS,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def fuzz(check: Callable[[], None]) -> None:
    """Try a property: once, or again and again until its time is over."""
    end = time.monotonic() + SECONDS
    check()
    while time.monotonic() < end:
        check()
