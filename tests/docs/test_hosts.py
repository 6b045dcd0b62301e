"""Two launchers meet as two hosts do, and train one model: docs/multi-gpu.md, "Several hosts"."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.alone
def test_two_launchers_with_a_rendezvous_train_one_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Name {i}.", "completion": f"It is {i}."} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"""--nnodes 2 --nproc-per-node 1 --rdzv-id run1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port}
        -m galore_trainer.cli train sft data.source=rows.jsonl data.eval_samples=0 model_name_or_path={tiny_model_dir}
        output_dir=run galore.rank=4 max_steps=2 gradient_accumulation_steps=1 per_device_train_batch_size=2
        save_strategy=no use_cpu=true bf16=false max_length=64"""
    hosts = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--node-rank", str(rank), *words.split()],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [host.communicate(timeout=240)[0] for host in hosts]
    finally:
        for host in hosts:
            if host.poll() is None:
                os.killpg(host.pid, signal.SIGKILL)
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(said)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["processes"], result["steps"]) == (2, 2)
