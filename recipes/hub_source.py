"""Rows of a data set on the hub, through ``datasets``; every failure becomes an ``OptionError`` with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from galore_trainer.errors import OptionError
from galore_trainer.hub import local_file, require_dataset
from galore_trainer.recipes.sources import Row

DEFAULT_SUBSET = {"openai/gsm8k": "main"}
DEFAULT_REVISION = dict.fromkeys(("tuetschek/e2e_nlg", "tuetschek/e2e_nlg_cleaned"), "refs/convert/parquet")


def read_hub(
    option: str, repo_id: str, *, subset: str | None, split: str, revision: str | None, split_option: str
) -> list[Row]:
    """All rows of one split; answers within seconds where there is neither a network nor a copy in the cache.

    Args:
        option: the option that named ``repo_id``, for errors.
        repo_id: ``owner/name``.
        subset: configuration name; None for the data set's own default.
        split: name of a split, slices such as ``train[:100]`` included.
        revision: branch, tag or commit; None for the newest, of a data set that is a script for its converted copy.
        split_option: the option that named ``split``, for errors.
    """
    online = require_dataset(option, repo_id)
    if not online and revision is not None:
        raise OptionError("data.revision", revision, "unset without a network: the cache does not tell revisions apart")
    from datasets import load_dataset

    with _cache_only(not online):
        try:
            rows = load_dataset(
                repo_id,
                name=subset or DEFAULT_SUBSET.get(repo_id),
                split=split,
                revision=revision or DEFAULT_REVISION.get(repo_id),
            )
        except Exception as error:  # the libraries below raise a dozen unrelated classes; all mean "cannot be loaded"
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if "config" in reason.lower() and isinstance(error, ValueError):
                raise OptionError("data.subset", subset, f"a configuration of {repo_id} ({reason})") from error
            if "split" in reason.lower() and isinstance(error, ValueError):
                raise OptionError(split_option, split, f"a split of {repo_id} ({reason})") from error
            way_out = local_file(option, repo_id)
            if "scripts are no longer supported" in reason:
                way_out = "Its converted copy may load: data.revision=refs/convert/parquet."
            raise OptionError(option, repo_id, f"a data set that loads ({reason})", way_out) from error
    name = repo_id.split("/")[-1]
    return [
        Row(fields, f"row {index}", f"{name}/{split}/{index}", option, repo_id) for index, fields in enumerate(rows)
    ]


@contextmanager
def _cache_only(on: bool) -> Iterator[None]:
    """Let ``datasets`` go to its cache at once instead of retrying a hub that is known to be out of reach."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or on
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
