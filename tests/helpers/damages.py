"""Twelve ways in which a file of a checkpoint is damaged, and manifests that vouch for nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from galore_trainer.run.launching.checkpoints import ASIDE, MANIFEST, checkpoints, choose_checkpoint, damage


def _cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def _overwrite(path: Path, place: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


def _flip(path: Path) -> None:
    place = path.stat().st_size // 2
    with path.open("rb") as file:
        file.seek(place)
        byte = file.read(1)[0]
    _overwrite(path, place, bytes([byte ^ 64]))


def _zeros(path: Path) -> None:
    place = path.stat().st_size // 3
    _overwrite(path, place, bytes(min(64, place)))


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _loop(path: Path) -> None:
    other = path.with_name("loop")
    other.symlink_to(path)
    path.symlink_to(other)


WAYS: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: path.unlink(),
    "empty": lambda path: _cut(path, 0),
    "half of it": lambda path: _cut(path, path.stat().st_size // 2),
    "one byte short": lambda path: _cut(path, path.stat().st_size - 1),
    "one byte longer": lambda path: _overwrite(path, path.stat().st_size, b"x"),
    "one bit flipped": _flip,
    "a block of zeros": _zeros,
    "other bytes of this length": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
    "a folder": lambda path: _replace(path, Path.mkdir),
    "a link to nothing": lambda path: _replace(path, lambda place: place.symlink_to("nothing")),
    "a loop of links": lambda path: _replace(path, _loop),
    "a pipe": lambda path: _replace(path, os.mkfifo),
}

MANIFESTS: dict[str, str] = {
    "null": "null",
    "a list": "[]",
    "a number": "1",
    "NaN": "NaN",
    "a text": '"files"',
    "nothing": "",
    "no files": "{}",
    "files: null": '{"files": null}',
    "files: a list": '{"files": []}',
    "files: NaN": '{"files": NaN}',
    "vouches for nothing": '{"files": {}}',
    "a size of null": '{"files": {"optimizer.pt": null}}',
    "NaN for a size": '{"files": {"optimizer.pt": [NaN, NaN]}}',
    "one number": '{"files": {"optimizer.pt": [1]}}',
    "texts": '{"files": {"optimizer.pt": ["1", "2"]}}',
    "true": '{"files": {"optimizer.pt": [true, true]}}',
    "5,000 digits": '{"files": {"a": [' + "9" * 5000 + ", 1]}}",
    "deep nesting": "[" * 100_000,
    "deep nesting inside": '{"files": ' + '{"a":' * 100_000,
    "outside": '{"files": {"../checkpoint-4/a": [1, 1]}}',
    "absolute": '{"files": {"/etc/hostname": [1, 1]}}',
    "NUL": '{"files": {"a\\u0000b": [1, 1]}}',
    "half a surrogate": '{"files": {"\\ud800": [1, 1]}}',
    "a long name": '{"files": {"' + "a" * 5000 + '": [1, 1]}}',
    "the folder itself": '{"files": {"": [1, 1]}}',
    "no UTF-8": "\udcff",
}


@contextlib.contextmanager
def damaged(run: Path, name: str, do: Callable[[Path], object]) -> Iterator[str | None]:
    """What is said of a run's newest checkpoint while one of its files is damaged; then all is as before."""
    newest = checkpoints(run)[0]
    kept = run / ASIDE / "kept"
    shutil.copytree(newest, kept)
    try:
        do(newest / name)
        yield damage(newest)
    finally:
        shutil.rmtree(newest)
        kept.rename(newest)


def falls_back(run: Path, name: str, do: Callable[[Path], object]) -> bool:
    """Whether ``--resume auto`` tells of the damage to a file, and goes on from the checkpoint before."""
    newest, before = checkpoints(run)[:2]
    with damaged(run, name, do) as wrong:
        chosen, notes = choose_checkpoint("auto", run)
        return bool(wrong) and chosen == before and f"{newest.name} is not used: {wrong}" in notes


def write_manifest(text: str) -> Callable[[Path], object]:
    """Replace the content of a manifest."""
    return lambda path: path.write_bytes(text.encode("utf-8", "surrogateescape"))


def files_of(checkpoint: Path) -> list[str]:
    """The files of a checkpoint, its manifest among them."""
    files = [path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    assert MANIFEST in files
    return files
