"""Runs of a tiny model that are killed, and what must come of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from forked import meeting, start_python
from galore_trainer.run.launching.checkpoints import newest_whole, step_of

WORKER = Path(__file__).with_name("fault_worker.py")
SAVE_STEPS, LAST = 2, 5  # the last step ends neither an epoch (of three steps) nor a gap between two saves
GALORE = {"rank": 4, "update_proj_gap": 2, "residual_warmup_steps": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "galore_plus": {"galore": GALORE},
    "layer-wise, 8 bits": {
        "galore": {**GALORE, "layerwise": True, "state_bits": 8, "basis_bits": 8},
        "gradient_accumulation_steps": 2,
    },
    "bfloat16, 16 bits": {"galore": {**GALORE, "state_bits": 16, "basis_bits": 16}, "dtype": "bfloat16"},
    "AdamW": {"method": "adamw"},
    "LoRA": {"method": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
    "TRL": {"galore": GALORE, "trainer": "trl", "packing": False},
    "two processes": {"galore": GALORE, "per_device_train_batch_size": 1},
}
Kill = tuple[str, int]
"""One of the worker's ``POINTS``, and a step."""
SEALED = ("before the rotation", "half of the rotation", "after the rotation")
FINAL: tuple[Kill, ...] = (("half of the model", LAST), ("before the result", LAST))
IN_SAVE = (
    "before the save",
    "half of the weights",
    "half of the optimizer",
    "before the trainer's state",
    "before the manifest",
    "half of the manifest",
    *SEALED,
)


def settings(variant: str, model: Path, output: Path, **more: Any) -> dict[str, Any]:
    """The configuration of a run of five steps, of which checkpoints are kept as ``save_total_limit: 1`` says."""
    batch = 1 if VARIANTS[variant].get("gradient_accumulation_steps") else 2
    return {
        "model_name_or_path": str(model),
        "output_dir": str(output),
        "max_length": 400,
        "max_steps": LAST,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        "data": {"source": "embedded:arithmetic", "train_samples": 6, "eval_samples": 0},
        "eval": {"before": False},
        **VARIANTS[variant],
        **more,
    }


class Worker:
    """A run in forked processes, one for each rank; its output is in ``log``."""

    def __init__(self, folder: Path, case: Mapping[str, Any], *, processes: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"log-{len(list(folder.glob('log-*')))}.txt"
        path = self.log.with_suffix(".json")
        path.write_text(json.dumps({"resume": None, **case}))
        environments = [{**os.environ, "OMP_NUM_THREADS": "1"}]
        if processes > 1:
            self._store, environments = meeting(processes)
        words = [sys.executable, str(WORKER), str(path)]
        with self.log.open("w") as file:
            self.ranks = [start_python(words, env=env, stdout=file, stderr=file) for env in environments]

    def wait(self, timeout: float = 120.0) -> int:
        """The exit code of the first process that ends otherwise than well, upon which the others are killed."""
        deadline = time.monotonic() + timeout
        while any(rank.poll() is None for rank in self.ranks) and not any(rank.poll() for rank in self.ranks):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.005)
        code = next((rank.poll() for rank in self.ranks if rank.poll()), 0)
        for rank in self.ranks:
            rank.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(10)
        return code or 0

    def said(self) -> str:
        return self.log.read_text()


@dataclasses.dataclass
class Outcome:
    """What became of a run that was killed.

    Attributes:
        kills: how often.
        lost: how often no checkpoint, or an older one, was whole where a newer one had been.
        equal: the model and the last checkpoint are those of a run that nothing happened to, bit for bit.
    """

    kills: int
    lost: int
    equal: bool


class Campaign:
    """Kills runs of one variant, and compares what they come to with what one comes to that is left alone."""

    def __init__(self, variant: str, model: Path, folder: Path) -> None:
        self.variant, self.model, self.folder = variant, model, folder
        self.processes = 2 if variant == "two processes" else 1
        self.whole = folder / "whole"
        worker = self._start("whole", None)
        assert worker.wait() == 0, worker.said()
        self.state = state(self.whole)

    def kill(self, name: str, kills: Sequence[Kill]) -> Outcome:
        """Start a run, kill it at each of these points, resuming in between, and let it end.

        Args:
            name: of its folder.
            kills: in this order.
        """
        run, lost, newest = self.folder / name, 0, 0
        for i, kill in enumerate(kills):
            worker = self._start(name, "auto" if i else None, kill=kill)
            assert worker.wait() == -signal.SIGKILL, worker.said()
            point, step = kill
            sealed = step if point in SEALED or kill in FINAL else max(newest, (step - 1) // SAVE_STEPS * SAVE_STEPS)
            found = newest_whole(run)
            newest = step_of(found) if found else 0
            lost += newest < sealed
        worker = self._start(name, "auto")
        assert worker.wait() == 0, worker.said()
        return Outcome(len(kills), lost, equal(self.state, state(run)))

    def kill_at_random(self, name: str, delays: Sequence[float]) -> Outcome:
        """As ``kill``, each time some seconds after the start, wherever the run is by then."""
        run, lost, newest, kills = self.folder / name, 0, 0, 0
        for delay in delays:
            worker = self._start(name, "auto")
            time.sleep(delay)
            for rank in worker.ranks:
                rank.kill()
            kills += worker.wait() == -signal.SIGKILL
            found = newest_whole(run)
            lost += (step_of(found) if found else 0) < newest
            newest = step_of(found) if found else 0
        worker = self._start(name, "auto")
        assert worker.wait() == 0, worker.said()
        return Outcome(kills, lost, equal(self.state, state(run)))

    def _start(self, name: str, resume: str | None, **case: Any) -> Worker:
        run = self.folder / name
        config = settings(self.variant, self.model, run)
        return Worker(
            self.folder / f"{name}-logs", {"config": config, "resume": resume, **case}, processes=self.processes
        )


def state(run: Path) -> dict[str, Any]:
    """What a run came to: the model it saved, and the optimizer's state after the last step."""
    last = run / f"checkpoint-{LAST}"
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    return {"model": load_file(run / "model" / "model.safetensors"), "optimizer": optimizer}


def equal(a: Any, b: Any) -> bool:
    """Whether nested tensors and numbers are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)
