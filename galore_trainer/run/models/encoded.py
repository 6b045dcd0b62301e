"""Token ids that are made once: a data set's rows lie in the cache folder under a key of all that decides them.

The key is a hash of the examples, the tokenizer with its chat template, ``max_length`` and the version of this package.
A lock lets one process of several make the rows while the others wait. A folder whose files are not those that were
written is removed and made anew. All folders together take ``MOST_BYTES``; those that were used longest ago go first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import galore_trainer
from galore_trainer.run.models.model import cache_dir
from galore_trainer.run.models.prompts import Encoded, encode_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from galore_trainer.recipes import Example

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it where the same example is encoded otherwise than before
MOST_BYTES = 10 * 2**30
RECORD = "record.json"


def encoded(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> Encoded:
    """What ``encode_all`` returns, from the cache where it is there; ``rows`` is a ``datasets.Dataset``.

    Raises:
        OptionError: as ``encode_all``.
    """
    from filelock import FileLock

    folder = cache_dir() / "tokenized" / _key(tokenizer, examples, max_length)
    made: Encoded | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if (rows := _read(folder)) is None:
                made = encode_all(tokenizer, examples, max_length)
                _write(folder, made)
                _make_room(folder)
                rows = _read(folder)
    except OSError as error:
        logger.warning("Tokenized examples are not kept in %s: %s", folder.parent, error)
        return made or encode_all(tokenizer, examples, max_length)
    return rows or made or encode_all(tokenizer, examples, max_length)


def _key(tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], max_length: int) -> str:
    digest = hashlib.blake2b(digest_size=20)
    settings = [FORMAT, galore_trainer.__version__, max_length, type(tokenizer).__name__, _state(tokenizer)]
    digest.update(json.dumps(settings, default=str, sort_keys=True).encode())
    for example in examples:
        row = [example.messages, example.target, example.trained, example.id]
        digest.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """All of a tokenizer that decides ids."""
    if tokenizer.is_fast:
        vocabulary: Any = tokenizer.backend_tokenizer.to_str()
    else:
        from datasets.fingerprint import Hasher

        vocabulary = Hasher.hash(tokenizer)
    return [vocabulary, tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.eos_token_id]


def _write(folder: Path, made: Encoded) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    partial = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    ids = List(Value("int32"))
    names = ("input_ids", "labels")
    columns = {name: [row[name] for row in made.rows] for name in names}
    shows = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        Dataset.from_dict(columns, features=Features(dict.fromkeys(names, ids))).save_to_disk(str(partial))
        record = {"dropped": made.dropped, "files": {path.name: _digest(path) for path in sorted(partial.iterdir())}}
        (partial / RECORD).write_text(json.dumps(record), encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if shows:
            enable_progress_bar()


def _read(folder: Path) -> Encoded | None:
    """The rows of a folder; None where there are none, or not those that were written, which are removed."""
    from datasets import load_from_disk

    if not folder.is_dir():
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if {name: _digest(folder / name) for name in record["files"]} != record["files"]:
            raise ValueError("its files have changed")
        rows = load_from_disk(str(folder))
        os.utime(folder)
        return Encoded(rows, record["dropped"])
    except Exception as error:  # damaged files raise whatever their readers do
        logger.warning("Tokenized examples in %s are made anew: %s", folder, error)
        shutil.rmtree(folder)
        return None


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _make_room(newest: Path) -> None:
    """Remove what was used longest ago until the rest is small enough; the newest stays."""
    folders = [path for path in newest.parent.iterdir() if path.is_dir()]
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in folders}
    for path in sorted(folders, key=lambda path: path.stat().st_mtime):
        if sum(sizes.values()) > MOST_BYTES and path != newest:
            shutil.rmtree(path, ignore_errors=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
            del sizes[path]
