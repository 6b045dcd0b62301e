"""Scripts that tests run in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PINNED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
}
"""Environment in which every x86 CPU gives equal bits: one thread, the narrowest vectors, no accelerator."""


def run_script(script: Path, *words: str, processes: int | None = None, **environment: str) -> None:
    """Run a script to its end; an error shows what it printed.

    Args:
        script: a Python file.
        words: its arguments.
        processes: how many torchrun starts; None runs the script without torchrun.
        environment: variables beside those of this process.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
        capture_output=True,
        text=True,
    )
    told = done.stderr.split("torch/distributed/elastic")[0]  # what follows is the launcher's own traceback
    assert done.returncode == 0, told[-4000:]
