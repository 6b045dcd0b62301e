"""When the files of a folder were written."""

from __future__ import annotations

from pathlib import Path


def times(folder: Path) -> dict[Path, int]:
    """Each file with its time in nanoseconds; without lock files, which filelock before 4.2 writes at each locking."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path: path.stat().st_mtime_ns for path in files}
