"""Progress of a run: one live line on a terminal, plain lines of names and values elsewhere."""

from __future__ import annotations

import collections
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from transformers import TrainerCallback

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 10.0
STEPS_OF_PACE = 50  # over which the pace is taken
BESIDE_FIGURES = len("evaluating the bar /  0:00:00 left")
SAMPLE = 500  # rows whose mean length tells the tokens of a step
SHOWN = ("loss", "eval_loss", "grad_norm", "learning_rate", "galore/projection_error")
"""Figures of a log that are printed; all others stand in ``log.jsonl``."""


def on_terminal() -> bool:
    """Whether a live line can be drawn: both streams end in a terminal, so that nothing else is mixed into it."""
    return sys.stdout.isatty() and sys.stderr.isatty()


class Pace:
    """Steps a second, evaluation and saving left out, from the clock alone: no step waits for the device."""

    def __init__(self) -> None:
        self._times = collections.deque[float](maxlen=STEPS_OF_PACE + 1)
        self._last = self._away = 0.0

    def start(self) -> None:
        """Training begins now."""
        self._last, self._away = time.perf_counter(), 0.0
        self._times.append(self._last)

    def step(self) -> None:
        """A step ends now."""
        self._last = time.perf_counter()
        self._times.append(self._last - self._away)

    def resume(self) -> None:
        """What came after the last step, an evaluation or a checkpoint, ends now."""
        now = time.perf_counter()
        self._away += now - self._last
        self._last = now

    def steps_per_second(self) -> float | None:
        """Over the last steps; None before the first one."""
        seconds = self._times[-1] - self._times[0] if self._times else 0.0
        return (len(self._times) - 1) / seconds if seconds > 0 else None


class ProgressCallback(TrainerCallback):
    """Shows the progress of training.

    Args:
        rows: encoded examples, whose mean length gives the tokens of a step.
        live: whether to draw a live line; else a line is printed at each log.
    """

    def __init__(self, rows: Any, *, live: bool) -> None:
        self.live, self.pace = live, Pace()
        stride = max(len(rows) // SAMPLE, 1)
        lengths = [len(rows[i]["input_ids"]) for i in range(0, len(rows), stride)]
        self._tokens_per_row = sum(lengths) / max(len(lengths), 1)
        self._tokens_per_step = self._start = 0.0
        self._bar: Progress | None = None
        self._latest: dict[str, Any] = {}

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Leave the terminal as it was, however training ends."""
        try:
            yield
        finally:
            self._close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start of the clock."""
        self._start = time.perf_counter()
        self.pace.start()
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._tokens_per_step = self._tokens_per_row * rows
        if self.live and state.is_world_process_zero:
            self._bar = make_bar()
            self._bar.add_task("training", total=state.max_steps, completed=state.global_step, figures="")
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        self.pace.step()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step, figures=self._figures(state))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation is going on."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description="evaluating")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation ends."""
        self.pace.resume()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description="training")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is written."""
        self.pace.resume()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step is done."""
        self._close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """New figures."""
        if not state.is_world_process_zero or not logs or not ("loss" in logs or "eval_loss" in logs):
            return
        shown = {key.removeprefix("galore/"): logs[key] for key in SHOWN if logs.get(key) is not None}
        figures = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
        if self._bar is None:  # a file gets lines of its own: rich writes to it only as a bar stops
            words = [f"step {state.global_step}/{state.max_steps}", figures]
            if "loss" in logs and (rate := self._tokens_per_second()):
                words.append(f"{rate:.0f} tokens/s")
            print("  ".join([*words, f"{time.perf_counter() - self._start:.0f} s"]), flush=True)
        elif "loss" in logs:
            self._latest = shown
            self._bar.update(self._bar.task_ids[0], figures=self._figures(state))
        else:
            self.tell(f"step {state.global_step}  {figures}")

    def tell(self, text: str) -> None:
        """Print a text of its own lines, above the bar where there is one."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.console.print(text, highlight=False, markup=False)

    def _figures(self, state: Any) -> str:
        """As many of the newest figures as there is room for."""
        words = []
        if "loss" in self._latest:
            words.append(f"loss {self._latest['loss']:.4g}")
        if rate := self._tokens_per_second():
            words.append(f"{rate:,.0f} tok/s")
        if "learning_rate" in self._latest:
            words.insert(1, f"lr {self._latest['learning_rate']:.2g}")
        width = self._bar.console.width if self._bar is not None else 0
        room = width - BESIDE_FIGURES - 2 * len(str(state.max_steps))
        while words and len("  ".join(words)) > room:
            words.pop(1 if len(words) > 1 else 0)
        return "  ".join(words)

    def _tokens_per_second(self) -> float | None:
        rate = self.pace.steps_per_second()
        return None if rate is None else rate * self._tokens_per_step

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def make_bar() -> Progress:
    """A live line on standard error: what goes on, a bar, steps, figures, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Time(TimeRemainingColumn):
        def render(self, task: Task) -> Text:
            return super().render(task).append("" if task.finished else " left")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        Time(elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        refresh_per_second=4,
        expand=True,
    )


@contextlib.contextmanager
def counting(what: str, *, file: TextIO | None = None, silent: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show progress of what is no training: a live line on a terminal, else at most one line in ten seconds.

    Args:
        what: goes on, in words.
        file: gets the plain lines; standard output where None.
        silent: show nothing.

    Yields:
        A function of (done, total).
    """
    if silent:
        yield lambda done, total: None
    elif on_terminal():
        bar = make_bar()
        task = bar.add_task(what, total=None, figures="")
        with bar:
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        last = time.perf_counter()

        def show(done: int, total: int) -> None:
            nonlocal last
            if done == total or time.perf_counter() - last > SECONDS_BETWEEN_LINES:
                last = time.perf_counter()
                print(f"{what} {done} of {total}", file=file, flush=True)

        yield show


class Say:
    """Prints on the main process alone."""

    def __init__(self, main: bool) -> None:
        self.main = main

    def __call__(self, text: str) -> None:
        """Print one line."""
        if self.main:
            print(text, flush=True)

    def counting(self, what: str) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
        """``counting`` on the main process, nothing on others."""
        return counting(what, silent=not self.main)
