"""Checkpoints of every backend in small, and payloads that leave a mark if they are ever unpickled."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BACKENDS = ("single", "ddp", "fsdp2", "fsdp2-full", "zero2", "zero3")
STATE = {"param_groups": [{"params": [0], "lr": 1e-3, "names": ["w"]}], "state": {0: {"step": 3, "m": torch.ones(4)}}}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def make_checkpoint(folder: Path, backend: str) -> Path:
    """The files of a checkpoint-3 as a backend names them; what is in them trains nothing."""
    folder.mkdir(parents=True)
    state = {"global_step": 3, "max_steps": 6, "epoch": 0.5, "log_history": [{"step": 1, "loss": 2.5}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    torch.save({"last_epoch": 3, "_last_lr": [1e-3]}, folder / "scheduler.pt")
    torch.save({"output_dir": "out"}, folder / "training_args.bin")
    names = ["rng_state.pth"] if backend == "single" else ["rng_state_0.pth", "rng_state_1.pth"]
    for name in names:
        torch.save({"python": (3, (1, 2), None), "numpy": random_state(), "cpu": torch.get_rng_state()}, folder / name)
    if backend in ("single", "ddp"):
        torch.save(STATE, folder / "optimizer.pt")
        save_file({"w": torch.ones(4)}, folder / "model.safetensors")
    elif backend == "fsdp2-full":
        torch.save(STATE, folder / "optimizer.bin")
        torch.save({"w": torch.ones(4)}, folder / "pytorch_model_fsdp.bin")
    elif backend == "fsdp2":
        save_dcp(folder / "optimizer_0", {"optimizer": STATE})
        save_dcp(folder / "pytorch_model_fsdp_0", {"model": {"w": torch.ones(4)}})
    else:
        steps = folder / "global_step3"
        steps.mkdir()
        (folder / "latest").write_text("global_step3")
        model = "mp_rank_00_model_states.pt" if backend == "zero2" else "zero_pp_rank_0_mp_rank_00_model_states.pt"
        torch.save({"module": {"w": torch.ones(4)}, "shared_params": {}}, steps / model)
        for rank in range(2):
            name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save({"optimizer_state_dict": {"optimizer_state_dict": STATE}}, steps / name)
    return folder


def random_state() -> Any:
    """numpy's, which is an array of its own classes."""
    import numpy as np

    return np.random.RandomState(0).get_state()


def save_dcp(folder: Path, state: dict[str, Any]) -> None:
    """Write a state as FSDP2 does, from one process."""
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=folder, no_dist=True)


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
        plant_in_dcp(path, payload)
    else:
        torch.save({"whole": torch.ones(2), "payload": payload}, path)


def plant_in_dcp(path: Path, payload: Payload) -> None:
    """Append a payload to a ``.distcp`` file and have the metadata name it as the object that stands there."""
    import dataclasses
    import io

    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    buffer = io.BytesIO()
    torch.save(payload, buffer)
    metadata = pickle.loads(path.with_name(".metadata").read_bytes())
    index, info = next((i, s) for i, s in metadata.storage_data.items() if s.relative_path == path.name)
    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    place = {"offset": path.stat().st_size, "length": len(buffer.getvalue())}
    metadata.storage_data[index] = dataclasses.replace(info, **place)
    path.write_bytes(path.read_bytes() + buffer.getvalue())
    path.with_name(".metadata").write_bytes(pickle.dumps(metadata))
