"""Checkpoints of every backend, and payloads that leave a mark if they are ever unpickled."""

from __future__ import annotations

import dataclasses
import io
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"
BACKENDS = {
    "single": "single-8-bit",
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "fsdp2-full": "fsdp2",
    "zero2": "zero2",
    "zero3": "zero3",
}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def make_checkpoint(backend: str, folder: Path) -> Path:
    """A checkpoint that a backend wrote, with the files that are not kept among the fixtures."""
    import numpy as np

    shutil.copytree(FIXTURES / BACKENDS[backend] / "checkpoint-6", folder, copy_function=shutil.copyfile)
    torch.save({"output_dir": "out"}, folder / "training_args.bin")
    random_states = {"python": (3, (1, 2), None), "numpy": np.random.RandomState(0).get_state(), "cpu": torch.ones(2)}
    for name in ["rng_state.pth"] if backend == "single" else ["rng_state_0.pth", "rng_state_1.pth"]:
        torch.save(random_states, folder / name)
    if backend == "fsdp2-full":
        for part, name in (("optimizer_0", "optimizer.bin"), ("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin")):
            shutil.rmtree(folder / part)
            torch.save({"state": {"w": {"exp_avg": torch.ones(4)}}, "param_groups": []}, folder / name)
    return folder


def pickled(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint that somebody unpickles."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".pt", ".pth", ".bin", ".distcp") or path.name == ".metadata":
            yield path


def plant(path: Path, mark: Path, *, bare: bool = False) -> None:
    """Put a payload into a file, which stays what it was beside it; ``bare``: a pickle alone."""
    payload = Payload(mark)
    if bare:
        path.write_bytes(pickle.dumps(payload))
    elif path.name == ".metadata":
        metadata = pickle.loads(path.read_bytes())
        metadata.planner_data = payload
        path.write_bytes(pickle.dumps(metadata))
    elif path.suffix == ".distcp":
        _plant_in_dcp(path, payload)
    else:
        torch.save({"whole": torch.ones(2), "payload": payload}, path)


def _plant_in_dcp(path: Path, payload: Payload) -> None:
    """Append a payload to a ``.distcp`` file and have the metadata name it as the object that stands there."""
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    metadata = pickle.loads(path.with_name(".metadata").read_bytes())
    index, info = next((i, s) for i, s in metadata.storage_data.items() if s.relative_path == path.name)
    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    place = {"offset": path.stat().st_size, "length": len(buffer.getvalue())}
    metadata.storage_data[index] = dataclasses.replace(info, **place)
    path.write_bytes(path.read_bytes() + buffer.getvalue())
    path.with_name(".metadata").write_bytes(pickle.dumps(metadata))
