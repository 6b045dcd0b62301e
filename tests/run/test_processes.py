"""Who speaks for a run is known before its process group; accelerate is asked only once there is one."""

from __future__ import annotations

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

from galore_trainer.run.launching.distributed import is_main_process
from galore_trainer.run.training.callbacks import InterruptCallback


@pytest.mark.parametrize(("rank", "main"), [(None, True), ("0", True), ("1", False)])
def test_the_main_process_is_known_without_a_process_group(
    rank: str | None, main: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
    assert is_main_process() == main
    assert PartialState._shared_state == {}  # else the group would have accelerate's timeouts and backend
    assert not torch.distributed.is_initialized()


def test_one_process_votes_and_waits_alone() -> None:
    interrupt = InterruptCallback()
    assert not interrupt.heard()
    assert not PartialState().use_distributed
    PartialState().wait_for_everyone()
    assert not torch.distributed.is_initialized()
