"""Callbacks of a run: seconds by part, sealed checkpoints, Ctrl-C with a checkpoint, a file of logs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from galore_trainer.hf.callback import tell_rebuilt_schedule
from galore_trainer.run.launching.checkpoints import remove, rotate, seal
from galore_trainer.run.launching.distributed import is_main_process
from galore_trainer.run.training.finite import FiniteCallback
from galore_trainer.timing import Stopwatch


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
    """Seals every checkpoint once all processes have written their part; only then do older ones go.

    The Trainer itself would remove old checkpoints before the new one is sealed: take its ``save_total_limit`` away.

    Args:
        limit: ``save_total_limit``.
        finite: knows whether the step had a finite loss; a checkpoint of any other step is not kept.
    """

    def __init__(self, limit: int | None, finite: FiniteCallback) -> None:
        self.limit, self.finite = limit, finite

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after the checkpoint's last file."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if self.finite.in_a_row():
                remove(folder)
                print(f"{folder.name} is not kept: the loss of its step was not finite", file=sys.stderr)
            else:
                seal(folder)
                rotate(folder, self.limit, state.best_model_checkpoint)
        PartialState().wait_for_everyone()  # the launcher ends processes that still read


class RunIsOver(Exception):
    """A run was resumed whose last step was taken before."""


class EndCallback(TrainerCallback):
    """Leaves ``Trainer.train`` before a step beyond the last one.

    The Trainer asks only after a step whether it was the last. Everything is loaded when this callback, the last one,
    is told that training begins.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise ``RunIsOver`` where no step is left."""
        if state.global_step >= state.max_steps:
            raise RunIsOver


class ScheduleCallback(TrainerCallback):
    """Says where a resumed run's learning rate jumps, for methods without ``GaLoreCallback``, which says it itself."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the checkpoint's rate with the schedule's."""
        if state.is_world_process_zero:
            tell_rebuilt_schedule(state, kwargs["optimizer"], kwargs["lr_scheduler"])


BURST = 1.0
"""Seconds in which several signals are one: a scheduler signals a launcher, which passes it on, and its processes."""


class InterruptCallback(TrainerCallback):
    """The first Ctrl-C or SIGTERM ends training after the current step, with a checkpoint; the second ends it at once.

    Processes that train together stop after the same step, whichever of them heard it first.
    """

    def __init__(self) -> None:
        self._heard_at: float | None = None
        self._group: Any = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catch both signals while training; elsewhere they stay what they were."""
        launched, speaks = "WORLD_SIZE" in os.environ, is_main_process()

        def note(number: int, frame: Any) -> None:
            now, first = time.monotonic(), self._heard_at is None
            self._heard_at = self._heard_at or now
            if not first and launched and now - self._heard_at < BURST:
                return
            if speaks:  # print is not reentrant: the signal may have interrupted it
                after = "saving a checkpoint after this step (again to stop at once)"
                text = f"interrupted: {after}" if first else "stopped at once, without a checkpoint of this step"
                os.write(2, f"\n{text}\n".encode())
            if not first:
                raise KeyboardInterrupt

        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def heard(self) -> bool:
        """Whether any process was interrupted; all of them must ask."""
        heard = self._heard_at is not None
        if not PartialState().use_distributed:
            return heard
        if self._group is None:  # a separate group on the CPU, so that no step waits for the GPU
            self._group = torch.distributed.new_group(backend="gloo")
        votes = torch.tensor(int(heard))
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(votes)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer to save and stop."""
        if self.heard():
            control.should_save = control.should_training_stop = True


class LogCallback(TrainerCallback):
    """Appends every log to ``log.jsonl``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One JSON object, one line."""
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
