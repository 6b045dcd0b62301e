"""Two processes under DDP end with the weights of one process on the whole batch, and with equal ones on both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

SCRIPT = Path(__file__).with_name("ddp_script.py")


def test_two_processes_equal_one(torchrun: Callable[..., None], tiny_model_dir: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        torchrun(processes, SCRIPT, str(tiny_model_dir), str(tmp_path))
    alone, first, second = (
        torch.load(tmp_path / f"weights-{name}.pt", weights_only=True) for name in ("0-of-1", "0-of-2", "1-of-2")
    )
    for name in alone:
        assert torch.equal(first[name], second[name])
        # Sums of gradients come in another order, and Adam normalises residual entries near zero: 1.5e-5 seen in one
        # entry of a matrix, where five steps move weights by up to 0.1; without the residual 1e-5 holds.
        torch.testing.assert_close(first[name], alone[name], rtol=0, atol=5e-5)
