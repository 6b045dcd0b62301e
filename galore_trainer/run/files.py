"""Files that are written whole or not at all: text, bytes and JSON."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galore_trainer.errors import OptionError


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file as a whole or not at all, text as UTF-8: neither a crash nor a full disk leaves half a file.

    Raises:
        OSError: nothing was written; the old content, if any, is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}-{uuid.uuid4().hex}"
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        flush_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a file renamed into it survives a power cut."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without this operation
            raise
    finally:
        os.close(number)


def check_writable(option: str, path: str | Path) -> None:
    """Refuse a path that cannot be written, before hours of work: a folder of that name, or no permission.

    Args:
        option: that named the file, for the error.
        path: of a file that ``write_file`` is to write; nothing is left there.

    Raises:
        OptionError: with what the system says.
    """
    path, wanted = Path(path), "the path of a file that can be written"
    new: list[Path] = []
    try:
        if path.exists() and not path.is_file():
            raise FileExistsError("something else of this name exists")
        new = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:40]}-"):
            pass
    except (OSError, ValueError) as error:
        raise OptionError(option, str(path), wanted, f"{error}.") from None
    finally:
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def write_json(path: str | Path, value: Any) -> None:
    """Write standard JSON, indented, whole or not at all; numbers that JSON lacks (NaN, infinities) become null."""
    write_file(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
