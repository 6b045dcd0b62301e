"""State of sharded weights as checkpoint tools want it: row by row as DTensors, with the same keys at every time.

``torch.distributed.checkpoint`` reads into a state that a step on zero gradients has made, and takes a plain tensor
for equal on all processes. So what is not there yet is written as zeros, with a number that says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.galore import compute_dtype
from galore_trainer.core.residual import CANDIDATES
from galore_trainer.layouts.dtensor import is_dtensor, like
from galore_trainer.optim.pieces import ROW_KEYS
from galore_trainer.optim.residual_state import AGE
from galore_trainer.optim.stack import MOMENTS
from galore_trainer.targets.matrices import has_residual, support_shape

PHASE = "residual_phase"  # 0: no residual yet, 1: candidates, 2: a support
LIVES_IN = {"candidate_index": 1, "candidate_mean": 1}


def pack_shards(saved: dict[str, Any], groups: list[dict[str, Any]], config: GaLoreConfig) -> None:
    """Turn local rows in a state dict of ``torch.optim.Optimizer`` into DTensors, in place."""
    index = 0
    for group in groups:
        for i, p in enumerate(group["params"]):
            state = saved["state"].get(index)
            if state and is_dtensor(p):
                matrices = group["matrices"][i] if group["projected"] else ()
                saved["state"][index] = _pack(state, p, matrices, config)
            index += 1


def _pack(state: Mapping[str, Any], p: Any, matrices: Any, config: GaLoreConfig) -> dict[str, Any]:
    packed = dict(state)
    with_residual = [m for m in matrices if has_residual(m, config)]
    if with_residual:
        # from what is the same on every process, whatever rows it holds: of a plain number one process's copy is kept
        packed[PHASE] = 2 if any(key.endswith(AGE) for key in state) else int(state["refreshes"] > 0)
        rows, device, columns = len(state["exp_avg"]), state["exp_avg"].device, with_residual[0].columns
        entries = support_shape(with_residual[0], config)[-1]
        for key in ROW_KEYS[2:]:
            wide = entries * (CANDIDATES if key in LIVES_IN and config.residual_warmup_steps else 1)
            dtype = torch.int32 if key.endswith("index") else state["exp_avg"].dtype
            dtype = compute_dtype(p.dtype) if key == "candidate_mean" else dtype
            wide = min(wide, columns)
            packed.setdefault(key, torch.zeros(rows, wide, dtype=dtype, device=device))
        for matrix in with_residual:
            packed.setdefault(matrix.prefix + AGE, torch.zeros((), dtype=torch.float32, device=device))
    sharded = ROW_KEYS if matrices else tuple(key for key, _ in MOMENTS)
    return {key: like(value, p) if key in sharded else value for key, value in packed.items()}


def unpack_shard(packed: Mapping[str, Any], p: Any) -> dict[str, Any]:
    """Undo ``pack_shards`` for one parameter: this process's rows, of what there was."""
    state = dict(living(packed))
    for key, value in state.items():
        if is_dtensor(value):
            value = value.to_local()
            state[key] = value.reshape(-1, value.shape[-1]) if "refreshes" in packed else value.flatten()
    return state


def living(packed: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Of what ``pack_shards`` wrote for one parameter, what there was."""
    phase = packed.get(PHASE)
    for key, value in packed.items():
        name = key.rsplit(".", 1)[-1]
        residual = name in ROW_KEYS[2:] or name == AGE
        if key != PHASE and (not residual or phase is None or phase == LIVES_IN.get(name, 2)):
            yield key, value
