"""Python processes that start with torch and transformers imported, which takes a new interpreter five seconds.

A server, started once, imports the libraries and forks for each process. It starts from a clean interpreter, so nothing
of the tests' own process reaches the forks but their arguments, environment, working folder and output.
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
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([
    "transformers.trainer", "transformers.models.llama.modeling_llama", "deepspeed", "galore_trainer.hf.elastic",
    "galore_trainer.run.train", "galore_trainer.cli.main",
])  # fmt: skip


class _Output:
    """A file descriptor that a process takes along."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _detach, (reduction.DupFd(self.number),)


def _detach(sent: Any) -> int:
    return sent.detach()


class Forked:
    """``python [-u] -m MODULE WORDS`` or ``python SCRIPT WORDS``, with what tests use of ``subprocess.Popen``.

    ``stdout`` and ``stderr`` are open files; None is the output of this process.
    """

    def __init__(
        self, args: Sequence[str], *, env: Mapping[str, str] | None = None, stdout: Any = None, stderr: Any = None,
        start_new_session: bool = False,
    ) -> None:  # fmt: skip
        self.args = list(args)
        words = [word for word in self.args[1:] if word != "-u"]
        outputs = [_Output(number if file is None else file.fileno()) for number, file in ((1, stdout), (2, stderr))]
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._process = _context.Process(
            target=_run, args=(words, dict(os.environ if env is None else env), outputs, start_new_session), daemon=True
        )  # fmt: skip
        self._process.start()
        self.pid = self._process.pid

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
            os.kill(int(self.pid or 0), number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(words: list[str], env: dict[str, str], outputs: list[int], new_session: bool) -> None:
    if new_session:
        os.setsid()
    for number, output in enumerate(outputs, start=1):
        os.dup2(output, number)
        os.close(output)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", "1")))  # the library read its variable in the server
    gc.freeze()  # else a collection copies the memory of all that the server imported
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if deepspeed := sys.modules.get("deepspeed"):  # its shared-memory operation needs a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def run_ranks(count: int, folder: Path, script: Path, *words: str, seconds: float = 300.0) -> None:
    """Run ``torchrun --nproc-per-node COUNT SCRIPT WORDS``, and fail with the ranks' output where one of them fails.

    Args:
        count: processes.
        folder: takes ``rank-0.txt`` and so on, the output of each.
        seconds: after which the ranks are killed.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    logs = [folder / f"rank-{rank}.txt" for rank in range(count)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(Forked([sys.executable, str(script), *words], env=own, stdout=file, stderr=file))
    deadline = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    else:
        deadline = time.monotonic() + 5.0  # the others of a rank that failed have their time to say why they do
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(deadline - time.monotonic(), 0.0))
    codes = [rank.poll() for rank in ranks]
    for rank in ranks:
        rank.kill()
    told = "\n".join(f"--- rank {i}, exit code {codes[i]}:\n{log.read_text()[-6000:]}" for i, log in enumerate(logs))
    assert codes == [0] * count, told
