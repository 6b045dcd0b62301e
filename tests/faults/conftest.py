"""One finished run of which two checkpoints are there, and the campaigns of kills."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from faults import Campaign, Worker, settings


@pytest.fixture(scope="session")
def two_checkpoints(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended well, with ``checkpoint-4`` and ``checkpoint-5``; what changes it changes it back."""
    folder = tmp_path_factory.mktemp("two")
    config = settings("galore_plus", tiny_model_dir, folder / "run", save_total_limit=2)
    worker = Worker(folder, {"config": config})
    assert worker.wait() == 0, worker.said()
    return folder / "run"


@pytest.fixture
def campaign(tiny_model_dir: Path, tmp_path: Path) -> Callable[[str], Campaign]:
    """``campaign(variant)``: runs of it to be killed, beside one that is left alone."""
    return lambda variant: Campaign(variant, tiny_model_dir, tmp_path)
