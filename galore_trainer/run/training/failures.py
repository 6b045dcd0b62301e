"""Errors of a run in one sentence with the cause and the last good checkpoint; unfinished checkpoints are removed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from galore_trainer.run.launching.checkpoints import checkpoints, is_sealed, newest_whole, remove, step_of

LIMITS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a system answers where a disk is full, a quota is used up, or a file may not grow further."""

TORCH = re.compile(r"inline_container|PytorchStreamWriter|ios\w*::clear")
"""Messages of torch where its C++ code could not write, whatever the reason."""


def disk_limit(error: BaseException) -> str | None:
    """The limit of the disk that an error comes from, in the system's words; None for any other error.

    Torch and safetensors report it in texts of their own, which other libraries wrap.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        text = str(cause)
        number = cause.errno if isinstance(cause, OSError) else None
        if match := re.search(r"\(os error (\d+)\)", text):  # as Rust writes it
            number = int(match[1])
        for limit in LIMITS:
            if number == limit or os.strerror(limit) in text:
                return os.strerror(limit)
        if TORCH.search(text) and "Reader" not in text:
            return "torch could not finish a file"
        cause = cause.__cause__ or cause.__context__
    return None


@contextlib.contextmanager
def explained(output: Path, *unfinished: str) -> Iterator[None]:
    """Turn a full disk, and losses or weights that are not finite, into an error of one sentence.

    Checkpoints that were not finished are removed.

    Args:
        output: the run's folder.
        unfinished: names in it of what is being written, and is removed too where the disk is full.

    Raises:
        RuntimeError: in place of both.
    """
    try:
        yield
    except Exception as error:
        limit = disk_limit(error)
        if limit is None and not isinstance(error, FloatingPointError):
            raise
        newest = newest_whole(output)
        broken = [path for path in checkpoints(output) if not is_sealed(path)]
        broken = [path for path in broken if newest is None or step_of(path) > step_of(newest)]
        for path in [*broken, *(output / name for name in unfinished if limit)]:
            remove(path)
        if limit is None:
            kept = f"the last good checkpoint is {newest.name}" if newest else "no checkpoint was good yet"
            raise RuntimeError(f"training has failed: {error} ({kept})") from error
        removed = f"{broken[0].name} could not be finished and was removed; " if broken else ""
        kept = (
            f"{newest.name} is whole: free some space, then --resume auto" if newest else "no checkpoint was whole yet"
        )
        raise RuntimeError(f"the disk is full or limited ({limit}): {removed}{kept}") from error
