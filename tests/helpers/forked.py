"""Python processes for tests: a run that is killed, and the ranks of a launch.

A new interpreter needs five seconds to import torch and transformers. Here a server imports them once and forks for
each process. The server is an interpreter of its own: a process gets its arguments, environment, working folder and
output from the tests, and nothing else. CUDA does not survive a fork: a machine with a GPU starts new interpreters.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

FORKS = not Path("/dev/nvidiactl").exists()
NO_COMPILER = Path(__file__).with_name("no_compiler")
LIBRARIES = [
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
    "galore_trainer.hf.state_import",
    "galore_trainer.run.training.train",
    "galore_trainer.cli.main",
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


def start_python(
    args: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdout: Any = None,
    stderr: Any = None,
    start_new_session: bool = False,
) -> Forked | subprocess.Popen[bytes]:
    """Start ``python [-u] -m MODULE WORDS`` or ``python [-u] SCRIPT WORDS``; stands in for ``subprocess.Popen``.

    Args:
        args: the interpreter and what follows it.
        env: the whole environment; that of this process where None.
        stdout, stderr: open files; the output of this process where None.
        start_new_session: make it the leader of a new process group.
    """
    own = dict(os.environ if env is None else env)
    if FORKS:
        return Forked(args, own, (stdout, stderr), start_new_session)
    own["PYTHONPATH"] = os.pathsep.join([str(NO_COMPILER), *filter(None, [own.get("PYTHONPATH")])])
    return subprocess.Popen(args, env=own, stdout=stdout, stderr=stderr, start_new_session=start_new_session)


@contextlib.contextmanager
def python(args: Sequence[str], **more: Any) -> Iterator[Forked | subprocess.Popen[bytes]]:
    """A process of ``start_python``, which is killed at the end if it still runs."""
    process = start_python(args, **more)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def meeting(count: int) -> tuple[TCPStore, list[dict[str, str]]]:
    """The environment of each rank of a launch on this machine, as torchrun makes it, and the store where they meet.

    The store lives as long as the launch.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    return store, [{**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def run_ranks(count: int, folder: Path, script: Path, *words: str, seconds: float = 300.0) -> None:
    """Run ``torchrun --nproc-per-node COUNT SCRIPT WORDS``, and fail with the ranks' output where one of them fails.

    Args:
        count: processes.
        folder: takes ``rank-0.txt`` and so on, the output of each.
        script: a Python file.
        words: its arguments.
        seconds: after which the ranks are killed.
    """
    _store, environments = meeting(count)
    logs = [folder / f"rank-{rank}.txt" for rank in range(count)]
    with contextlib.ExitStack() as started:
        ranks = []
        for env, log in zip(environments, logs, strict=True):
            file = started.enter_context(log.open("w"))
            process = python([sys.executable, str(script), *words], env=env, stdout=file, stderr=file)
            ranks.append(started.enter_context(process))
        deadline = time.monotonic() + seconds
        while {None} <= {rank.poll() for rank in ranks} <= {None, 0} and time.monotonic() < deadline:
            time.sleep(0.02)
        last_words = time.monotonic() + 5.0  # of the others, where one has failed
        while None in (codes := [rank.poll() for rank in ranks]) and time.monotonic() < min(deadline, last_words):
            time.sleep(0.02)
    told = "\n".join(f"--- rank {i}, exit code {codes[i]}:\n{log.read_text()[-6000:]}" for i, log in enumerate(logs))
    assert codes == [0] * count, told


class Forked:
    """A fork of the server, with what is used of ``subprocess.Popen``."""

    def __init__(self, args: Sequence[str], env: dict[str, str], files: Sequence[Any], new_session: bool) -> None:
        self.args = [word for word in args if word != "-u"]
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        outputs = [_Output(number if file is None else file.fileno()) for number, file in enumerate(files, start=1)]
        self._process = _context.Process(target=_run, args=(self.args[1:], env, outputs, new_session), daemon=True)
        self._process.start()
        self.pid = int(self._process.pid or 0)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Output:
    """A file descriptor that a process takes along."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _detach, (reduction.DupFd(self.number),)


def _detach(sent: Any) -> int:
    return sent.detach()


def _run(words: list[str], env: dict[str, str], outputs: list[int], new_session: bool) -> None:
    if new_session:
        os.setsid()
    for number, output in enumerate(outputs, start=1):
        os.dup2(output, number)
        os.close(output)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", "1")))  # the library read its variable in the server
    gc.freeze()  # else a collection copies the memory of all that the server imported
    runpy.run_path(str(NO_COMPILER / "sitecustomize.py"))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
