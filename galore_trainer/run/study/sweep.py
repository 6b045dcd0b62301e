"""Running a study: each cell and seed is a separate process, so that a failure does not end the other runs."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from galore_trainer.errors import OptionError
from galore_trainer.run.files import write_file
from galore_trainer.run.launching.distributed import die_with_parent
from galore_trainer.run.launching.launch import threads_each
from galore_trainer.run.scoring.scores import in_words
from galore_trainer.run.settings.methods import METHODS
from galore_trainer.run.settings.run_config import RESOLVED_CONFIG
from galore_trainer.run.study.grid import Study
from galore_trainer.run.study.record import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    TIMING,
    WAITING,
    Job,
    Record,
    read_result,
    remove_weights,
    timing_config,
)
from galore_trainer.run.study.sweep_memory import VISIBLE, choose_jobs, visible_devices
from galore_trainer.run.study.sweep_plan import count_all_steps, select

POLL_SECONDS = 0.2
LOG_LINES = 20
EXIT_INTERRUPTED = 130
OUT_OF_MEMORY = re.compile(
    r"out of memory|can(no|')t allocate memory|MemoryError|_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED", re.I
)
"""Messages of libraries that are out of memory; the last one is of cuBLAS, which cannot start."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a sweep ended.

    Attributes:
        failed: reason by run, of those that were tried.
        unfinished: how many runs of the study are still to do, the failed ones aside.
        interrupted: by Ctrl-C or SIGTERM.
    """

    failed: dict[str, str]
    unfinished: int
    interrupted: bool


@dataclasses.dataclass
class _Child:
    job: Job
    process: subprocess.Popen[bytes]
    start: float
    exclusive: bool
    log_start: int
    device: str | None
    beside: int = 0  # most other runs on the device at a time


def ablate(
    study: Study,
    output: Path,
    *,
    jobs: int | Literal["auto"] = 1,
    only: str | None = None,
    max_cells: int | None = None,
    keep_models: bool = False,
    timing: bool = True,
    command: str = "",
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run what is still to do of a study, and record what became of it in ``study.json``.

    Finished runs are left alone, others go on from their last checkpoint. With several jobs the runs' own times are not
    exclusive: a short timing pass of each cell follows, alone on the device. Every run has one device; where there are
    several, jobs spread over them. A run for which the memory did not suffice beside others waits, and goes on with
    fewer beside it; only alone has it failed.

    Args:
        study: resolved cells.
        output: the study's folder.
        jobs: runs side by side; ``auto`` lets as many run as fit into the memory, see ``choose_jobs``.
        only: part of a cell's name; other cells wait.
        max_cells: most runs to start; the others wait.
        keep_models: leave trained models and checkpoints in the runs' folders.
        timing: do the timing passes; without them a report's times are those of runs that shared the device.
        command: as the user typed it, for the report.
        say: takes one line of progress.

    Raises:
        OptionError: nothing was started.
    """
    from filelock import FileLock, Timeout

    environment = dict(os.environ)  # before transformers writes its own settings into it
    record = Record(study, output)
    todo = select(record, only)[:max_cells]
    steps = count_all_steps(study)
    if jobs == "auto":
        jobs, reason = choose_jobs([job.config for job in todo], visible_devices(environment), environment)
        say(reason)
    output.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(output / ".sweep.lock").acquire(timeout=0)
    except Timeout:
        raise OptionError("--output-dir", str(output), "a folder that no other sweep works in") from None
    if command and command not in record.commands:
        record.commands.append(command)
    sweep = _Sweep(record, environment, keep_models=keep_models, say=say)
    tried, interrupted = [*todo], False
    with lock, _terminable():
        try:
            sweep.run(todo, jobs)
            if timing and (timings := record.to_time()):
                say(f"{len(timings)} timing passes, one at a time")
                tried += timings
                sweep.run([_prepare_timing(job, steps[job.slug]) for job in timings], 1)
        except KeyboardInterrupt:
            interrupted = True
    failed = {job.name: job.entry["reason"] for job in tried if job.entry["status"] == FAILED}
    unfinished = [job for job in record.runs if job.entry["status"] not in (FINISHED, FAILED)]
    return Outcome(failed, len(unfinished), interrupted)


def _prepare_timing(job: Job, steps: int) -> Job:
    shutil.rmtree(job.folder, ignore_errors=True)
    return dataclasses.replace(job, config=timing_config(job.config, steps))


class _Sweep:
    """Starts, watches and ends the processes of a study."""

    def __init__(
        self, record: Record, environment: dict[str, str], *, keep_models: bool, say: Callable[[str], None]
    ) -> None:
        self.record, self.environment, self.keep_models, self.say = record, environment, keep_models, say
        self.devices = visible_devices(environment)
        self.most: dict[str | None, int] = {}  # limit of runs at a time on a device that was out of memory
        self.total, self.done, self.stopping = 0, 0, False

    def run(self, jobs: Sequence[Job], parallel: int) -> None:
        """Run all jobs, some at a time; on KeyboardInterrupt the running ones save a checkpoint and end."""
        waiting, running = collections.deque(jobs), list[_Child]()
        parallel = min(parallel, len(jobs))
        self.total, self.done = len(jobs), 0
        self.record.save()
        try:
            while waiting or running:
                while waiting and len(running) < parallel and (devices := self._with_room(running)):
                    running.append(self._start(waiting.popleft(), parallel, devices[0]))
                    _count_neighbours(running)
                time.sleep(POLL_SECONDS)
                waiting.extendleft(self._collect(running))
        except KeyboardInterrupt:
            self.say("interrupted: the running cells save a checkpoint and end (again to stop at once)")
            self._stop(running)
            raise

    def _with_room(self, running: Sequence[_Child]) -> list[str | None]:
        """The devices that may have one more run, those with the fewest first."""
        busy = collections.Counter(child.device for child in running)
        devices: list[str | None] = [*self.devices] or [None]
        devices = [device for device in devices if busy[device] < self.most.get(device, sys.maxsize)]
        return sorted(devices, key=busy.__getitem__)

    def _start(self, job: Job, parallel: int, device: str | None) -> _Child:
        path = job.folder.with_suffix(".yaml")
        write_file(path, job.config.to_yaml())
        command = [sys.executable, "-m", "galore_trainer.cli", "train", str(path), *_start_flags(job)]
        job.entry.update(status=RUNNING, reason=None)
        job.entry.pop("log_tail", None)
        self.record.save()
        self.say(f"start {job.entry['folder']}")
        with job.folder.with_suffix(".log").open("ab") as log:
            end = log.seek(0, os.SEEK_END)
            device_choice = {} if device is None else {VISIBLE: device}
            process = start_process(command, log, _shared_cores(self.environment, parallel) | device_choice)
        return _Child(job, process, time.perf_counter(), parallel == 1, end, device)

    def _collect(self, running: list[_Child]) -> list[Job]:
        """Record the runs that have ended; those are returned that are to go on with fewer beside them."""
        ended = [child for child in running if child.process.poll() is not None]
        for child in ended:
            running.remove(child)
        survivors = collections.Counter(child.device for child in running)
        return [child.job for child in ended if not self._finish(child, survivors[child.device])]

    def _finish(self, child: _Child, survivors: int) -> bool:
        job, entry, code = child.job, child.job.entry, child.process.returncode
        seconds = time.perf_counter() - child.start
        entry["wall_seconds"] += seconds
        entry["exclusive"] = entry["exclusive"] and child.exclusive
        entry["exit_code"] = code
        result = read_result(job.folder) if code == 0 else None
        stopped = code in (EXIT_INTERRUPTED, -signal.SIGINT) or (self.stopping and code == -signal.SIGKILL)
        if result is None and not stopped and child.beside and self._wants_room(child, survivors):
            return False
        self.done += 1
        if result is not None:
            entry.update(status=FINISHED, steps=result["steps"])
            timing = job.folder.name == TIMING
            score = in_words(result["score_after"]) if result["score_after"] and not timing else ""
            text = f"finished in {seconds:.0f} s{': ' if score else ''}{score}"
            if timing or not self.keep_models:
                remove_weights(job.folder)
        else:
            lines = _log_of(child)
            entry.update(status=INTERRUPTED if stopped else FAILED, log_tail=lines[-LOG_LINES:])
            entry["reason"] = None if stopped else failure(code, lines)
            text = "interrupted" if stopped else f"failed: {entry['reason']} ({job.folder.with_suffix('.log')})"
        self.record.save()
        self.say(f"[{self.done}/{self.total}] {entry['folder']} {text}")
        return True

    def _wants_room(self, child: _Child, survivors: int) -> bool:
        """Make a run that was out of memory beside others wait; False where it ended for another reason.

        Its place is not filled: from now on the device has at most as many runs at a time as have survived there, or
        half of those that were there.
        """
        lines = _log_of(child)
        if not out_of_memory(child.process.returncode, lines):
            return False
        # equal runs fail at the same moment, and the last of them would leave room for one: half of them is tried first
        fewer = max(survivors, (child.beside + 1) // 2, 1)
        most = self.most[child.device] = min(self.most.get(child.device, sys.maxsize), fewer)
        reason = f"out of memory beside {child.beside} others; from now on {most} at a time"
        child.job.entry.update(status=WAITING, reason=reason, log_tail=lines[-LOG_LINES:])
        self.record.save()
        self.say(f"{child.job.entry['folder']} waits: {reason}")
        return True

    def _stop(self, running: list[_Child]) -> None:
        """End the children: SIGINT for each interrupt, then, at the third, SIGKILL."""
        self.stopping = True
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
            for child in running:
                child.process.send_signal(number)
            with contextlib.suppress(KeyboardInterrupt):
                while running:
                    time.sleep(POLL_SECONDS)
                    self._collect(running)
                return


def _count_neighbours(running: Sequence[_Child]) -> None:
    busy = collections.Counter(child.device for child in running)
    for child in running:
        child.beside = max(child.beside, busy[child.device] - 1)


def _log_of(child: _Child) -> list[str]:
    log = child.job.folder.with_suffix(".log").read_bytes()[child.log_start :]
    return log.decode(errors="replace").splitlines()


def out_of_memory(code: int, lines: Sequence[str]) -> bool:
    """Whether a run failed for want of memory, of a device or of the system, which ends processes by SIGKILL."""
    return code == -signal.SIGKILL or OUT_OF_MEMORY.search(" ".join(lines[-LOG_LINES:])) is not None


def failure(code: int, lines: Sequence[str]) -> str:
    """Why a run failed, in one line, from its exit code and its log."""
    text = [line.strip() for line in lines if line.strip() and "--debug" not in line]
    word = next((line for line in reversed(text) if line.startswith(("Failed", "Error"))), text[-1] if text else "")
    word = re.sub(r"^(Failed|Error)( on rank \d+)?: ", "", word)
    if code >= 0 and out_of_memory(code, text):
        return f"out of memory: {word}"
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (", as a system short of memory does" if name == "SIGKILL" else "")
    return word or f"exit code {code}"


def start_process(command: list[str], log: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a run out of reach of the terminal's Ctrl-C, which this process passes on; it dies with this process."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        preexec_fn=_prepare_child if os.name == "posix" else None,
    )


def _prepare_child() -> None:
    """Receive SIGINT even where the parent ignores it, and (on Linux) end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent()


def _start_flags(job: Job) -> list[str]:
    if METHODS[job.config.method].resumable:
        return ["--resume", "auto"]
    return ["--overwrite"] if (job.folder / RESOLVED_CONFIG).is_file() else []


def _shared_cores(environment: dict[str, str], parallel: int) -> dict[str, str]:
    """The environment of a run: runs side by side divide the cores among them."""
    shared = {"OMP_NUM_THREADS": str(threads_each(parallel))} if parallel > 1 else {}
    return {"PYTHONUNBUFFERED": "1", **shared, **environment}


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that runs save a checkpoint when a batch system ends the sweep."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
