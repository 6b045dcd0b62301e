"""Check a checkpoint or a model from elsewhere before anything opens it: nothing in it may run as code.

torch reads DCP's ``.metadata``, and what is no tensor in its ``.distcp`` files, with an unrestricted unpickler, and
DeepSpeed its own files. An unrestricted unpickler calls whatever a file names. Here the names are compared with
lists of what rebuilds tensors, numbers and texts, and nothing is called that is not on a list. File names and step
numbers that a checkpoint contains are checked too, since paths are made of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import IO, Any, NoReturn

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.serialization import get_unsafe_globals_in_checkpoint

from galore_trainer.errors import OptionError

OPTION = "checkpoint"
TRAINER, ARGUMENTS = "trainer_state.json", "training_args.bin"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
WEIGHTS = re.compile(r"(pytorch_model|adapter_model).*\.bin")
ZIP = b"PK\x03\x04"  # what a file or an object of torch.save begins with
WHOLE = "a checkpoint with all of its files, whole"
DEPTH = 3  # of folders; the Trainer's checkpoints need one

# What torch.load(weights_only=True) does not know and the Trainer, accelerate or DeepSpeed write nevertheless.
STORED_BY_TRAINER = (
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
)
STORED_BY_DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# Nothing here reads training_args.bin, which holds settings of any package; code of Python's own does not belong there.
IN_ARGUMENTS = re.compile(r"(collections|datetime|enum|pathlib|__main__)\..*|functools\.partial")

_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}
STORED_BY_DCP: dict[str, set[str]] = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}  # fmt: skip


def check_checkpoint(checkpoint: str | Path, option: str = OPTION, *, best: bool = True) -> None:
    """Refuse a checkpoint-N folder of any backend that could run code or reach out of its folder.

    Call it before ``Trainer.train(resume_from_checkpoint=...)`` on a checkpoint that somebody else wrote. It reads
    what describes the tensors, not the tensors.

    Args:
        checkpoint: the folder.
        option: what named it, for the error.
        best: check the best checkpoint of its run, too, which ``load_best_model_at_end`` reads.

    Raises:
        OptionError: a file whose objects are more than tensors, numbers and texts; one that cannot be read; a
            ``trainer_state.json``, ``latest`` or index whose values could name a place outside the folder. The file is
            named.
    """
    folder = Path(checkpoint).expanduser()
    _check_files(folder, option)
    if (folder / TRAINER).is_file():
        state = trainer_state(folder, option)
        others = [Path(state.get("best_model_checkpoint") or folder)]
        others.append(folder.with_name(f"checkpoint-{state.get('best_global_step') or 0}"))
        for other in others if best else ():
            if other.is_dir() and other != folder:
                _check_files(other, option)


def check_weights(folder: Path, option: str) -> None:
    """Refuse a model's folder whose weights are not what they seem: tensors alone, in files beside each other.

    Raises:
        OptionError: naming the file.
    """
    whole = "a file of a complete causal language model"
    paths = [path for path in sorted(folder.iterdir()) if path.is_file()]
    safe = [path for path in paths if path.suffix == ".safetensors"]
    for path in paths:
        if path in safe:
            _check_header(path, option, whole)
        elif path.name.endswith(".index.json"):
            _check_index(path, option)
        elif WEIGHTS.fullmatch(path.name) and not safe:  # else it is not what would be loaded
            if zipfile.is_zipfile(path):
                _check_torch(path, path, option)
            else:  # the format of before torch 1.6, which only torch itself can tell from others
                with _reading(path, option, whole), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of pickle protocols
                    torch.load(path, map_location="meta", weights_only=True)


def trainer_state(checkpoint: Path, option: str = OPTION) -> dict[str, Any]:
    """The content of ``trainer_state.json``.

    Raises:
        OptionError: it cannot be read, or a field has another type than the Trainer writes.
    """
    path = checkpoint / TRAINER
    state = _json(path, option)
    if not isinstance(state, dict) or "global_step" not in state:
        _refuse(path, option, "the state of a Trainer, with its global_step")
    for name, value in state.items():
        if name in _STATE and not _STATE[name][0](value):
            got = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
            _refuse(path, option, f"{_STATE[name][1]} as {name!r}, not {got}")
    if unknown := state.keys() - _STATE.keys():
        from transformers.trainer_callback import TrainerState

        if unknown - TrainerState.__dataclass_fields__.keys():
            _refuse(path, option, f"fields that this version of transformers knows, not {', '.join(sorted(unknown))}")
    return state


# ------------------------------------------------------------------------------------------ files of a folder


def _check_files(folder: Path, option: str) -> None:
    for path in _files(folder, DEPTH):
        if path.is_file():
            _check_file(path, option)
        elif path.exists():
            _refuse(path, option, "a plain file")


def _check_file(path: Path, option: str) -> None:
    """Refuse a file by what would read it, which is told from its name."""
    if path.name.endswith(".metadata"):
        _check_dcp(path, option)
    elif path.suffix in TORCH_SUFFIXES:
        _check_torch(path, path, option)
    elif path.suffix == ".safetensors":
        _check_header(path, option)
    elif path.name.endswith(".index.json"):
        _check_index(path, option)
    elif path.suffix == ".json":
        _json(path, option)
    elif path.name == "latest":
        with _reading(path, option):
            tag = path.read_text(encoding="utf-8").strip()
        if not re.fullmatch(r"global_step\d+", tag):
            _refuse(path, option, "the name of a folder global_stepN")


def _files(folder: Path, depth: int) -> Iterator[Path]:
    """Everything in a folder but folders; links are followed, as they are when it is read."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path
        elif depth:
            yield from _files(path, depth - 1)


def _check_header(path: Path, option: str, whole: str = WHOLE) -> None:
    from safetensors import safe_open

    with _reading(path, option, whole), safe_open(path, framework="pt"):
        pass


def _check_torch(path: Path, source: Path | IO[bytes], option: str) -> None:
    """Refuse a file, or an object inside one, that ``torch.save`` did not write or that names what is on no list."""
    with _reading(path, option):
        names = set(get_unsafe_globals_in_checkpoint(source))
    if path.name == ARGUMENTS:
        names = {n for n in names if n.partition(".")[0] in sys.stdlib_module_names and not IN_ARGUMENTS.fullmatch(n)}
    if names := names.difference(STORED_BY_TRAINER, STORED_BY_DEEPSPEED):
        _refuse_names(path, option, *sorted(names))


def _check_dcp(path: Path, option: str) -> None:
    """Refuse the ``.metadata`` of ``torch.distributed.checkpoint``, or objects in the files that it describes."""
    with _reading(path, option):
        with path.open("rb") as file:
            metadata = _DcpUnpickler(file).load()
        kinds, files = metadata.state_dict_metadata, dict[str, list[Any]]()
        for index, info in metadata.storage_data.items():
            files.setdefault(str(info.relative_path), []).append((type(kinds.get(index.fqn)), info))
            if not _is_plain(str(info.relative_path)) or info.transform_descriptors:
                raise ValueError("it names more than files beside it, as they were written")
    for name, parts in files.items():
        data = path.with_name(name)
        with _reading(data, option), data.open("rb") as file:
            for kind, info in parts:
                # torch reads a tensor with weights_only, and anything else, which is small, without
                tensor = kind is TensorStorageMetadata
                file.seek(info.offset)
                part = file.read(len(ZIP) if tensor else info.length)
                if not part.startswith(ZIP):
                    raise ValueError(f"no object of torch.save at {info.offset}")
                if not tensor:
                    _check_torch(data, io.BytesIO(part), option)


class _DcpUnpickler(pickle.Unpickler):
    """Rebuilds what ``torch.distributed.checkpoint`` describes tensors with, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in STORED_BY_DCP.get(module, ()):
            raise _Named(f"{module}.{name}")
        return super().find_class(module, name)


class _Named(Exception):
    """A pickle names what is on no list."""


def _check_index(path: Path, option: str) -> None:
    index = _json(path, option)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) and _is_plain(name) for name in names.values()):
        _refuse(path, option, "a weight_map with names of files beside it")


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and PurePath(name).name == name and "\\" not in name and "\0" not in name


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


_COUNT, _NUMBER = (_is_count, "a step number"), (_or_none(_is_number), "a number")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_TABLE = (lambda value: value is None or isinstance(value, dict), "names and values")
_STATE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "global_step": _COUNT,
    "best_global_step": (_or_none(_is_count), "a step number or null"),
    "best_model_checkpoint": (_or_none(_is_checkpoint), "a folder checkpoint-N or null"),
    "log_history": (_is_log, "a list of logs, each with its step"),
    "is_local_process_zero": _FLAG,
    "is_world_process_zero": _FLAG,
    "is_hyper_param_search": _FLAG,
    "trial_name": (_or_none(lambda value: isinstance(value, str)), "a text or null"),
    "trial_params": _TABLE,
    "stateful_callbacks": _TABLE,
    **dict.fromkeys(
        ("epoch", "max_steps", "num_train_epochs", "train_batch_size", "num_input_tokens_seen", "total_flos",
         "best_metric", "logging_steps", "eval_steps", "save_steps"), _NUMBER,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------ errors


def _json(path: Path, option: str) -> Any:
    with _reading(path, option):
        return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _reading(path: Path, option: str, whole: str = WHOLE) -> Iterator[None]:
    """Whatever is raised means that the file is not what it should be."""
    try:
        yield
    except OptionError:
        raise
    except _Named as error:
        _refuse_names(path, option, str(error))
    except Exception as error:  # a damaged file makes any of a dozen classes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        _refuse(path, option, whole, f"It cannot be read ({reason}).")


def _refuse_names(path: Path, option: str, *names: str) -> NoReturn:
    shown = ", ".join(names[:3])
    _refuse(
        path, option, "tensors, numbers and texts alone", f"It names {shown}, which could run code: do not load it."
    )


def _refuse(path: Path, option: str, wanted: str, way_out: str = "") -> NoReturn:
    raise OptionError(option, str(path), wanted, way_out)
