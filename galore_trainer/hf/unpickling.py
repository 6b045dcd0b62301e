"""Check a checkpoint or a model from elsewhere before it is loaded, so that nothing in it can run as code.

An unrestricted unpickler calls every function that a file names. torch uses one for the ``.metadata`` of
``torch.distributed.checkpoint`` (DCP) and for objects other than tensors in its ``.distcp`` files; DeepSpeed uses one
for its own files. Here the names in the files are compared with lists of what rebuilds tensors, numbers and texts, and
nothing else is called. File names and step numbers in a checkpoint are checked too, because paths are made from them.
"""

from __future__ import annotations

import io
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any, NoReturn

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.serialization import get_unsafe_globals_in_checkpoint

from galore_trainer.hf.reading import OPTION, TRAINER, WHOLE, read_json, reading, refuse, trainer_state

ARGUMENTS = "training_args.bin"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
WEIGHTS = re.compile(r"(pytorch_model|adapter_model).*\.bin")
ZIP = b"PK\x03\x04"
"""First bytes of everything that ``torch.save`` writes."""
DEPTH = 3
"""Levels of folders that are checked; the Trainer's checkpoints have one."""

# Names that torch.load(weights_only=True) refuses, although the Trainer, accelerate or DeepSpeed write them.
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
# training_args.bin holds settings of any package and is not read here: only names of the standard library are checked.
IN_ARGUMENTS = re.compile(r"(collections|datetime|enum|pathlib|__main__)\..*|functools\.partial")

_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}
STORED_BY_DCP: dict[str, set[str]] = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}
"""Names that DCP's ``.metadata`` may contain, by module."""


def check_checkpoint(checkpoint: str | Path, option: str = OPTION, *, best: bool = True) -> None:
    """Refuse a checkpoint-N folder of any backend that could run code or name files outside its folder.

    Call it before ``Trainer.train(resume_from_checkpoint=...)`` on a checkpoint that somebody else wrote. It reads
    descriptions of tensors, not the tensors.

    Args:
        checkpoint: the folder.
        option: the option that named the folder, for the error.
        best: check the best checkpoint of the run too, which ``load_best_model_at_end`` reads.

    Raises:
        OptionError: with the name of the file: it contains objects other than tensors, numbers and texts; it cannot be
            read; it is a ``trainer_state.json``, ``latest`` or index whose values could name a file outside the folder.
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
    """Refuse a model's folder whose files of weights contain other things than tensors, or name files elsewhere.

    Args:
        folder: of a model.
        option: the option that named the folder, for the error.

    Raises:
        OptionError: with the name of the file.
    """
    whole = "a file of a complete causal language model"
    paths = [path for path in sorted(folder.iterdir()) if path.is_file()]
    safe = [path for path in paths if path.suffix == ".safetensors"]
    for path in paths:
        if path in safe:
            _check_header(path, option, whole)
        elif path.name.endswith(".index.json"):
            _check_index(path, option)
        elif WEIGHTS.fullmatch(path.name) and not safe:  # transformers prefers safetensors where there are both
            if zipfile.is_zipfile(path):
                _check_torch(path, path, option)
            else:  # the format before torch 1.6, which has no list of names to check: torch's own unpickler reads it
                with reading(path, option, whole), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns of old pickle protocols
                    torch.load(path, map_location="meta", weights_only=True)


# ------------------------------------------------------------------------------------------ files of a folder


def _check_files(folder: Path, option: str) -> None:
    for path in _files(folder, DEPTH):
        if path.is_file():
            _check_file(path, option)
        elif path.exists():
            refuse(path, option, "a plain file")


def _check_file(path: Path, option: str) -> None:
    """Refuse a file that is unsafe for its reader; the file's name decides which reader that is."""
    if path.name.endswith(".metadata"):
        _check_dcp(path, option)
    elif path.suffix in TORCH_SUFFIXES:
        _check_torch(path, path, option)
    elif path.suffix == ".safetensors":
        _check_header(path, option)
    elif path.name.endswith(".index.json"):
        _check_index(path, option)
    elif path.suffix == ".json":
        read_json(path, option)
    elif path.name == "latest":
        with reading(path, option):
            tag = path.read_text(encoding="utf-8").strip()
        if not re.fullmatch(r"global_step\d+", tag):
            refuse(path, option, "the name of a folder global_stepN")


def _files(folder: Path, depth: int) -> Iterator[Path]:
    """All files in a folder and its subfolders; links are followed, because readers follow them."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path
        elif depth:
            yield from _files(path, depth - 1)


def _check_header(path: Path, option: str, whole: str = WHOLE) -> None:
    from safetensors import safe_open

    with reading(path, option, whole), safe_open(path, framework="pt"):
        pass


def _check_torch(path: Path, source: Path | IO[bytes], option: str) -> None:
    """Refuse what ``torch.save`` did not write, or what names something that is on no list.

    Args:
        path: the file, for the error.
        source: the file, or the bytes of one object inside it.
        option: the option that named the checkpoint, for the error.
    """
    with reading(path, option):
        names = set(get_unsafe_globals_in_checkpoint(source))
    if path.name == ARGUMENTS:
        names = {n for n in names if n.partition(".")[0] in sys.stdlib_module_names and not IN_ARGUMENTS.fullmatch(n)}
    if unknown := names.difference(STORED_BY_TRAINER, STORED_BY_DEEPSPEED):
        _refuse_names(path, option, *sorted(unknown))


def _check_dcp(path: Path, option: str) -> None:
    """Refuse the ``.metadata`` of ``torch.distributed.checkpoint``, or objects in the files that it describes."""
    with reading(path, option):
        with path.open("rb") as file:
            metadata = _DcpUnpickler(file, path, option).load()
        kinds, files = metadata.state_dict_metadata, dict[str, list[Any]]()
        for index, info in metadata.storage_data.items():
            files.setdefault(str(info.relative_path), []).append((type(kinds.get(index.fqn)), info))
            # torch would call the code that a transform descriptor names
            if not _is_plain_name(str(info.relative_path)) or info.transform_descriptors:
                raise ValueError("it names more than files beside it, as they were written")
    for name, parts in files.items():
        data = path.with_name(name)
        with reading(data, option), data.open("rb") as file:
            for kind, info in parts:
                # torch reads a tensor with weights_only=True, anything else without, so that is checked in full
                is_tensor = kind is TensorStorageMetadata
                file.seek(info.offset)
                content = file.read(len(ZIP) if is_tensor else info.length)
                if not content.startswith(ZIP):
                    raise ValueError(f"no object of torch.save at {info.offset}")
                if not is_tensor:
                    _check_torch(data, io.BytesIO(content), option)


class _DcpUnpickler(pickle.Unpickler):
    """Rebuilds the classes with which ``torch.distributed.checkpoint`` describes tensors, and no others."""

    def __init__(self, file: IO[bytes], path: Path, option: str) -> None:
        super().__init__(file)
        self.path, self.option = path, option

    def find_class(self, module: str, name: str) -> Any:
        if name not in STORED_BY_DCP.get(module, ()):
            _refuse_names(self.path, self.option, f"{module}.{name}")
        return super().find_class(module, name)


def _check_index(path: Path, option: str) -> None:
    index = read_json(path, option)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and _is_plain_name(name) for name in names.values()
    ):
        refuse(path, option, "a weight_map with names of files beside it")


def _is_plain_name(name: str) -> bool:
    """Whether a file name has no folder in it, under the rules of any system."""
    return name not in ("", ".", "..") and PurePath(name).name == name and "\\" not in name and "\0" not in name


def _refuse_names(path: Path, option: str, *names: str) -> NoReturn:
    shown = ", ".join(names[:3])
    refuse(path, option, "tensors, numbers and texts alone", f"It names {shown}, which could run code: do not load it.")
