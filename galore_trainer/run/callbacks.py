"""What a run adds to the Trainer's loop: where time goes, sealed checkpoints, a soft Ctrl-C, one line a log."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from galore_trainer.optim.timing import Stopwatch
from galore_trainer.run.checkpoints import seal


class TimingCallback(TrainerCallback):
    """Seconds of training proper, by part; evaluation and saving are left out.

    ``step`` is a whole update step, ``optimizer`` its call of ``optimizer.step()``; the rest of a step is forward,
    backward and gradient clipping. Also notes the steps at which logs arrived, for tokens per second.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stopwatch = device, Stopwatch()
        self._open: dict[str, contextlib.AbstractContextManager[None]] = {}

    def _begin(self, name: str) -> None:
        self._open[name] = self.stopwatch.measure(name, self.device)
        self._open[name].__enter__()

    def _end(self, name: str) -> None:
        if name in self._open:
            self._open.pop(name).__exit__(None, None, None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start of the first micro-batch."""
        self._begin("step")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are ready and clipped."""
        self._begin("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights are updated."""
        self._end("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End of the step, before logs, evaluation and saving."""
        self._end("step")


class SealCallback(TrainerCallback):
    """Gives every checkpoint its manifest once all processes have written their part."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after the checkpoint's last file."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():  # save_total_limit may have removed it already
                seal(folder)


class InterruptCallback(TrainerCallback):
    """The first Ctrl-C ends training after the current step, with a checkpoint; the second one ends it at once."""

    def __init__(self) -> None:
        self.interrupted = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT while training; elsewhere it stays what it was."""

        def note(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            print("\ninterrupted: saving a checkpoint after this step (again to stop at once)", file=sys.stderr)

        previous = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer to save and stop."""
        if self.interrupted:
            control.should_save = control.should_training_stop = True


class LogCallback(TrainerCallback):
    """Appends every log to ``log.jsonl``, and prints a plain line where there is no progress bar."""

    def __init__(self, path: Path, print_lines: bool) -> None:
        self.path, self.print_lines = path, print_lines
        self._start = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start of the clock."""
        self._start = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One JSON object, one line."""
        if not state.is_world_process_zero or not logs:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if self.print_lines and ("loss" in logs or "eval_loss" in logs):
            shown = {k.removeprefix("galore/"): v for k, v in logs.items() if k in _SHOWN}
            text = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
            seconds = time.perf_counter() - self._start
            print(f"step {state.global_step}/{state.max_steps}  {text}  {seconds:.0f} s", flush=True)


_SHOWN = ("loss", "eval_loss", "grad_norm", "learning_rate", "galore/projection_error")
