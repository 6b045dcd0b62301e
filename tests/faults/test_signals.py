"""Signals to a run and to those who started it; two runs in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from faults import Worker, settings
from galore_trainer.errors import OptionError
from galore_trainer.run.launching.checkpoints import newest_whole
from galore_trainer.run.launching.start import LOCK, own_folder


def wait_for(done: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def endless(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Worker]:
    """``endless()``: a run that would take days, after its first steps."""

    def start(**case: object) -> Worker:
        config = settings("galore_plus", tiny_model_dir, tmp_path / "run", max_steps=100_000, save_steps=50_000)
        worker = Worker(tmp_path, {"config": config, **case})
        wait_for(lambda: "step 2/" in worker.said() or worker.ranks[0].poll() is not None)
        return worker

    return start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_saves_a_checkpoint(number: int, endless: Callable[..., Worker], tmp_path: Path) -> None:
    worker = endless()
    worker.ranks[0].send_signal(number)
    assert worker.wait() == 130, worker.said()
    assert "interrupted: saving a checkpoint after this step" in worker.said()
    newest = newest_whole(tmp_path / "run")
    assert f"go on with --resume auto (from {newest})" in worker.said()
    assert newest is not None


def test_the_second_one_ends_a_run_at_once(endless: Callable[..., Worker], tmp_path: Path) -> None:
    """Its third step would take an hour."""
    worker = endless(slow=3600)
    worker.ranks[0].send_signal(signal.SIGTERM)
    wait_for(lambda: "interrupted" in worker.said())
    worker.ranks[0].send_signal(signal.SIGTERM)
    assert worker.wait(10) == 130, worker.said()
    assert "stopped at once, without a checkpoint of this step" in worker.said()
    assert newest_whole(tmp_path / "run") is None
    with own_folder(tmp_path / "run"):  # it is free
        pass


def test_a_folder_has_one_run_at_a_time(endless: Callable[..., Worker], tmp_path: Path) -> None:
    worker = endless()
    with pytest.raises(OptionError, match=r"no other run works in.*Wait until"), own_folder(tmp_path / "run"):
        pytest.fail("two at a time")
    worker.ranks[0].kill()
    worker.wait()
    with own_folder(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).exists()


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path: Path) -> None:
    with pytest.raises(OptionError), own_folder(tmp_path / "a" / "b"):
        raise OptionError("x", 1, "2")
    assert not (tmp_path / "a").exists()
    with own_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "c").touch()
    assert os.listdir(tmp_path / "a") == ["c"]
    with pytest.raises(OptionError, match="is none"), own_folder(tmp_path / "a" / "c" / "d"):
        pass


CHILD = """import sys, time
from galore_trainer.run.launching.distributed import end_with_launcher
end_with_launcher()
print("up", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own call")
def test_processes_end_with_their_launcher() -> None:
    """Killed outright, torchrun could not end them."""
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    launcher = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=env)
    assert launcher.stdout is not None
    launcher.stdout.readline()
    (worker,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 10)
