"""Read files of a checkpoint, so that every failure is an ``OptionError`` which names the file."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.api import CheckpointException

from galore_trainer.errors import OptionError, typed_line

OPTION = "checkpoint"
TRAINER = "trainer_state.json"
WHOLE = "a checkpoint with all of its files, whole"

# transformers before 5.18 loads the optimizer of several processes on CPUs onto "cpu:0", where torch knows "cpu" alone.
torch.serialization.register_package(
    15, lambda storage: None, lambda storage, place: storage if re.fullmatch(r"cpu:\d+", place) else None
)


@contextlib.contextmanager
def reading(path: Path, option: str = OPTION, whole: str = WHOLE) -> Iterator[None]:
    """Turn every exception into an ``OptionError``, because damaged files raise many kinds of exceptions.

    Args:
        path: the file or folder that is read.
        option: the option that named it.
        whole: what it should be, in words.
    """
    try:
        yield
    except OptionError:
        raise
    except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
        refuse(path, option, whole, f"It cannot be read ({typed_line(error)}).", cause=error)


def refuse(path: Path, option: str, wanted: str, way_out: str = "", *, cause: BaseException | None = None) -> NoReturn:
    """Raise the ``OptionError`` for a file that is not what is wanted."""
    raise OptionError(option, str(path), wanted, way_out) from cause


def read_json(path: Path, option: str = OPTION) -> Any:
    """The content of a JSON file."""
    with reading(path, option):
        return json.loads(path.read_text(encoding="utf-8"))


def load_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote to a file: tensors, which stay on disk until they are used, and plain values."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def trainer_state(checkpoint: Path, option: str = OPTION) -> dict[str, Any]:
    """The content of ``trainer_state.json``.

    Raises:
        OptionError: it cannot be read, or a field has another type than the Trainer writes.
    """
    path = checkpoint / TRAINER
    state = read_json(path, option)
    if not isinstance(state, dict) or "global_step" not in state:
        refuse(path, option, "the state of a Trainer, with its global_step")
    for name, value in state.items():
        if name in _STATE and not _STATE[name][0](value):
            got = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
            refuse(path, option, f"{_STATE[name][1]} as {name!r}, not {got}")
    if unknown := state.keys() - _STATE.keys():
        from transformers.trainer_callback import TrainerState

        if unknown - TrainerState.__dataclass_fields__.keys():
            refuse(path, option, f"fields that this version of transformers knows, not {', '.join(sorted(unknown))}")
    return state


# ------------------------------------------------------------------------------------------ fields


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int) and 0 <= value < 2**63


def _is_log(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict) and ("step" not in row or _is_count(row["step"])) for row in value
    )


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_checkpoint(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"checkpoint-\d+", PurePath(value).name) is not None


_NUMBER = (_or_none(_is_number), "a number")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_TABLE = (_or_none(lambda value: isinstance(value, dict)), "names and values")
_NUMBERS = (
    *("epoch", "max_steps", "num_train_epochs", "train_batch_size", "num_input_tokens_seen", "total_flos"),
    *("best_metric", "logging_steps", "eval_steps", "save_steps"),
)
# fields of trainer_state.json: a check of the value, and the value in words
_STATE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "global_step": (_is_count, "a step number"),
    "best_global_step": (_or_none(_is_count), "a step number or null"),
    "best_model_checkpoint": (_or_none(_is_checkpoint), "a folder checkpoint-N or null"),
    "log_history": (_is_log, "a list of logs, each with its step"),
    "is_local_process_zero": _FLAG,
    "is_world_process_zero": _FLAG,
    "is_hyper_param_search": _FLAG,
    "trial_name": (_or_none(lambda value: isinstance(value, str)), "a text or null"),
    "trial_params": _TABLE,
    "stateful_callbacks": _TABLE,
    **dict.fromkeys(_NUMBERS, _NUMBER),
}
