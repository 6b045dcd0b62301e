"""A disk that is full or limited: one sentence, nothing broken left, and the run goes on from what was whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from faults import Worker, equal, settings, state
from galore_trainer.run.launching.checkpoints import checkpoints, damage, step_of
from galore_trainer.run.training.failures import disk_limit, explained
from galore_trainer.run.training.train import MODEL


def caused(by: BaseException) -> RuntimeError:
    try:
        raise RuntimeError("a library's own words") from by
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "limit"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded"),
        (OSError(errno.EFBIG, "x"), "File too large"),
        (caused(OSError(errno.EDQUOT, "x")), "Disk quota exceeded"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 470"), "torch could not"),
        (RuntimeError("basic_ios::clear: iostream error"), "torch could not"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "torch could not"),
        (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), "File too large"),
        (RuntimeError("Caught OSError in worker: [Errno 28] No space left on device"), "No space left on device"),
        (RuntimeError("PytorchStreamReader failed reading zip archive: inline_container"), None),
        (OSError(errno.EACCES, "x"), None),
        (ValueError("something else"), None),
    ],
)
def test_every_form_of_a_full_disk_is_known(error: Exception, limit: str | None, tmp_path: Path) -> None:
    told = disk_limit(error)
    assert told is None if limit is None else limit in str(told)
    wanted: Any = RuntimeError if limit else type(error)
    with pytest.raises(wanted, match=f"disk is full or limited.*{limit}" if limit else None), explained(tmp_path):
        raise error


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize("missing", [1, 100, 10_000, 300_000])
@pytest.mark.parametrize("write", ["torch", "torch in the old format", "safetensors", "python"])
def test_what_libraries_say_of_a_limit_is_known(write: str, missing: int, tmp_path: Path) -> None:
    """``RLIMIT_FSIZE`` makes their writes fail for certain; at the end of a file they say other things."""
    import resource

    tensor, path = torch.zeros(100_000), tmp_path / "file"
    writes: dict[str, Callable[[], object]] = {
        "torch": lambda: torch.save(tensor, path),
        "torch in the old format": lambda: torch.save(tensor, path, _use_new_zipfile_serialization=False),
        "safetensors": lambda: save_file({"x": tensor}, path),
        "python": lambda: path.write_bytes(bytes(400_000)),
    }
    writes[write]()
    size, before = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    path.unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - missing, before[1]))
    try:
        with pytest.raises(Exception) as found:  # noqa: PT011
            writes[write]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert disk_limit(found.value), found.value


def test_a_run_on_a_limited_disk_goes_on_once_it_has_room(
    two_checkpoints: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    limit = (two_checkpoints / "checkpoint-4" / "model.safetensors").stat().st_size - 1000
    case = {"config": settings("galore_plus", tiny_model_dir, tmp_path / "run")}
    first = Worker(tmp_path, {**case, "kill": ["before the save", 4]})
    first.wait()
    second = Worker(tmp_path, {**case, "resume": "auto", "file_bytes": limit})
    assert second.wait() == 1
    assert "RuntimeError: the disk is full or limited" in second.said()
    assert "checkpoint-4 could not be finished and was removed; checkpoint-2 is whole: free some" in second.said()
    assert [(step_of(path), damage(path)) for path in checkpoints(tmp_path / "run")] == [(2, None)]
    third = Worker(tmp_path, {**case, "resume": "auto"})
    assert third.wait() == 0, third.said()
    assert equal(state(tmp_path / "run"), state(two_checkpoints))


def test_a_model_that_could_not_be_written_whole_is_removed(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / MODEL).mkdir()
    (tmp_path / MODEL / "model.safetensors").write_bytes(b"half of it")
    with pytest.raises(RuntimeError, match="no checkpoint was whole yet"), explained(tmp_path, MODEL):
        raise OSError(errno.ENOSPC, "full")
    assert not (tmp_path / MODEL).exists()
