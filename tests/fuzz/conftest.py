"""Few examples in an ordinary run; ``FUZZ_SECONDS=60`` goes on with new ones for as long, test by test."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))

settings.register_profile(
    "fuzz", deadline=None, max_examples=200 if SECONDS else 12, derandomize=not SECONDS, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
settings.load_profile("fuzz")


@pytest.fixture
def fuzz() -> Callable[[Callable[[], None]], None]:
    """Runs a property: once, or again and again until its time is over."""

    def run(check: Callable[[], None]) -> None:
        end = time.monotonic() + SECONDS
        check()
        while time.monotonic() < end:
            check()

    return run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, with the environment put back afterwards; the hub is out of reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before: dict[str, Any] = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)
