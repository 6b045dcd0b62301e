"""The forms of a weight's state: as a step uses it, and as it is saved.

A step keeps moments by piece, and one age for all moments of a weight. Saved, a whole weight has the moments and the
age of each logical matrix under its prefix; a cut weight has them row by row in the order of the stored weight
([local rows, width], whatever the heads), so that they shard and gather like the weight itself. Counters (``calls``,
``refreshes``, ``due``, ``born``, ``phase``) are integers in a step and tensors without dimensions on the CPU in a state
dict, since ``torch.distributed.checkpoint`` loads nothing else in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.galore import compute_dtype
from galore_trainer.core.matrix import LogicalMatrix, Rows
from galore_trainer.core.residual import CANDIDATES_PER_ENTRY
from galore_trainer.errors import OptionError
from galore_trainer.layouts.find import is_cut, like, local
from galore_trainer.optim import residual
from galore_trainer.optim.bucket import MOMENTS, Bucket
from galore_trainer.optim.guards import no_skips
from galore_trainer.optim.local import AGE, RESIDUAL_AGE, LocalWeight
from galore_trainer.optim.saved_groups import WAY_OUT
from galore_trainer.targets.matrices import has_sparse, support_shape

COUNTERS = ("calls", "refreshes", "due", "born", "phase")
AGE_KEYS = (AGE, RESIDUAL_AGE)
ROW_KEYS = (*(key for key, _ in MOMENTS), *residual.ROWS)
"""What a cut weight saves row by row."""
BAR = "|"  # between a weight's name and a key, in the state of a flat tensor
PHASE = "residual_phase"  # 0: no residual yet, 1: candidates, 2: a support

State = Mapping[str, Any]


class StateInFlat(MutableMapping[str, Any]):
    """The state of one weight within that of a flat tensor: ``name|key``."""

    def __init__(self, flat: dict[str, Any], name: str) -> None:
        self.flat, self.prefix = flat, name + BAR

    def __getitem__(self, key: str) -> Any:
        return self.flat[self.prefix + key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.flat[self.prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self.flat[self.prefix + key]

    def __contains__(self, key: object) -> bool:
        return f"{self.prefix}{key}" in self.flat

    def __iter__(self) -> Iterator[str]:
        return (key[len(self.prefix) :] for key in list(self.flat) if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return self.prefix + "calls" in self.flat  # without looking at every key of every weight


def bare(key: str) -> str:
    """A key of a state without the names of a flat tensor's weight, of a matrix and of a piece."""
    return key.rsplit(BAR, 1)[-1].rsplit(".", 1)[-1]


# ---------------------------------------------------------------------- as a step uses it


def prepare_state(w: LocalWeight, config: GaLoreConfig, phase: int) -> None:
    """Make the state of a projected weight where there is none; cut into pieces one that was just loaded.

    Args:
        w: a weight in this step.
        config: of the optimizer.
        phase: place of its refreshes within the gap.
    """
    state = w.state
    if state:
        residual.start_norms(state, w.matrices, config)
        if not w.shard.is_whole and MOMENTS[0][0] in state:
            pieces_of_rows(state, w.matrices, w.rows(), w.name)
        return
    device = w.weight.device
    state.update(calls=0, refreshes=0, due=0, born=0, phase=phase, skipped=no_skips(device))
    state[AGE] = torch.zeros((), dtype=torch.float32, device=device)
    residual.start_norms(state, w.matrices, config)
    for piece in w.matrix_pieces():
        bucket = Bucket([piece])
        bucket.put_basis(bucket.zeros(piece.matrix.basis_shape))
    for piece in w.pieces_of_state():
        bucket = Bucket([piece])
        for key, signed in MOMENTS:
            bucket.put_moment(key, bucket.zeros(piece.matrix.moment_shape), signed=signed)


def one_age(state: MutableMapping[str, Any], matrices: Iterable[LogicalMatrix], name: str) -> None:
    """Put one age in the place of the saved ages of a weight's matrices.

    Raises:
        OptionError: they are not equal.
    """
    for key in AGE_KEYS:
        ages = {k: state[k] for matrix in matrices if (k := matrix.prefix + key) in state}
        if len({float(age) for age in ages.values()}) > 1:
            steps = sorted({int(age) for age in ages.values()})
            raise OptionError("checkpoint", f"matrices of {name} with {steps} steps", "equally many steps", WAY_OUT)
        for k, age in ages.items():
            del state[k]
            state[key] = age


def pieces_of_rows(
    state: MutableMapping[str, Any], matrices: Sequence[LogicalMatrix], pieces: Iterable[Rows], name: str
) -> None:
    """Cut a saved state of local rows into pieces, in place."""
    one_age(state, matrices, name)
    columns = matrices[0].columns
    by_rows = {key: state.pop(key) for key in ROW_KEYS if key in state}
    for key, value in by_rows.items():
        if key.endswith("_index") and value.numel() and not 0 <= int(value.min()) <= int(value.max()) < columns:
            raise OptionError("checkpoint", f"{name}: {key} outside of a row", f"positions below {columns}", WAY_OUT)
    for rows in pieces:
        for key, value in by_rows.items():
            if key not in residual.ROWS or rows.matrix.loses:
                shape = (rows.matrix.blocks, rows.matrix.block_rows, value.shape[-1])
                state[rows.prefix + key] = rows.of(value).reshape(shape).clone()


# ---------------------------------------------------------------------- as it is saved


def saved_form(
    state: State,
    matrices: Sequence[LogicalMatrix],
    config: GaLoreConfig,
    pieces: Sequence[Rows] = (),
    local_rows: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The state of a projected weight as it is saved.

    Args:
        state: as a step uses it, or as it was loaded and not used yet.
        matrices: the weight's logical matrices.
        config: of the optimizer.
        pieces: the local rows of a cut weight.
        local_rows: how many rows of a cut weight are here; None for a whole weight.
        dtype: of the weight.
    """
    saved = dict(state)
    for key in AGE_KEYS:
        if key in saved:
            age = saved.pop(key)
            aged = [m for m in matrices if key == AGE or has_sparse(m, config)]
            # tensors of their own: what a tool reads in place of one must not change another
            saved.update({matrix.prefix + key: age.clone() if matrix.prefix else age for matrix in aged})
    if local_rows is None or MOMENTS[0][0] in saved:
        return saved
    rows: dict[str, Tensor] = {}
    for piece in pieces:
        for key in ROW_KEYS:
            if piece.prefix + key in saved:
                value = saved.pop(piece.prefix + key)
                values = value.reshape(-1, value.shape[-1])
                if len(values) == local_rows and isinstance(piece.at, slice):
                    rows[key] = values
                else:
                    if key not in rows:
                        rows[key] = values.new_zeros(local_rows, value.shape[-1])
                    rows[key][piece.at] = values
    if not pieces:  # a process without a row has the same keys
        stored_in = torch.bfloat16 if config.state_bits == 16 else compute_dtype(dtype)
        shape, device = (local_rows, matrices[0].rank), state["skipped"].device
        rows = {key: torch.zeros(shape, dtype=stored_in, device=device) for key, _ in MOMENTS}
    return saved | rows


def saved_dtensor(state: State, p: Any, matrices: Sequence[LogicalMatrix], config: GaLoreConfig) -> dict[str, Any]:
    """A saved form of local rows as DTensors, with the same keys at every time.

    ``torch.distributed.checkpoint`` reads into a state that a step on zero gradients has made, and takes a plain tensor
    for equal on all processes. So what is not there yet is written as zeros, with a number that says so.
    """
    packed = dict(state)
    with_residual = [m for m in matrices if has_sparse(m, config)]
    if with_residual:
        # from what is the same on every process, whatever rows it holds: of a plain number one process's copy is kept
        has_support = any(key.endswith(RESIDUAL_AGE) for key in state)
        packed[PHASE] = 2 if has_support else int(state["refreshes"] > 0)
        rows, device, columns = len(state["exp_avg"]), state["exp_avg"].device, with_residual[0].columns
        entries = support_shape(with_residual[0], config)[-1]
        for key in residual.ROWS:
            if key in packed:
                continue
            wide = entries * (CANDIDATES_PER_ENTRY if key in residual.PHASE_OF and config.residual_warmup_steps else 1)
            dtype = torch.int32 if key.endswith("index") else state["exp_avg"].dtype
            dtype = compute_dtype(p.dtype) if key == residual.MEAN else dtype
            packed[key] = torch.zeros(rows, min(wide, columns), dtype=dtype, device=device)
        for matrix in with_residual:
            packed.setdefault(matrix.prefix + RESIDUAL_AGE, torch.zeros((), dtype=torch.float32, device=device))
    sharded = ROW_KEYS if matrices else tuple(key for key, _ in MOMENTS)
    return {key: like(value, p) if key in sharded else value for key, value in packed.items()}


def rows_of_dtensor(packed: State) -> dict[str, Any]:
    """Undo ``saved_dtensor``: this process's rows, of what there was."""
    state = dict(without_padding(packed))
    for key, value in state.items():
        if is_cut(value):
            value = local(value)
            state[key] = value.reshape(-1, value.shape[-1]) if "refreshes" in packed else value.flatten()
    return state


def without_padding(packed: State) -> Iterator[tuple[str, Any]]:
    """Of what ``saved_dtensor`` wrote, what there was."""
    phase = packed.get(PHASE)
    for key, value in packed.items():
        name = key.rsplit(".", 1)[-1]
        of_residual = name in residual.ROWS or name == RESIDUAL_AGE
        if key != PHASE and (not of_residual or phase is None or phase == residual.PHASE_OF.get(name, 2)):
            yield key, value


def packed_counters(state: State) -> dict[str, Any]:
    """A parameter's state with its counters as tensors."""
    return {
        key: torch.tensor(value, dtype=torch.int64, device="cpu") if bare(key) in COUNTERS else value
        for key, value in state.items()
    }


def restored(state: State, p: Tensor) -> dict[str, Any]:
    """A saved state of a parameter with counters as integers and ages as tensors.

    Every tensor is a contiguous copy on the parameter's device.
    """
    copy: dict[str, Any] = {}
    for key, value in state.items():
        if bare(key) in COUNTERS:
            if not 0 <= value == int(value):
                raise OptionError("checkpoint", f"{key} {value}", "a count", WAY_OUT)
            copy[key] = int(value)
        elif isinstance(value, Tensor) or bare(key) in AGE_KEYS:
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32, device="cpu")
            copy[key] = tensor.detach().to(p.device, copy=True).contiguous()
        else:
            copy[key] = value
    return copy


def bytes_by_kind(states: Iterable[tuple[bool, State]]) -> dict[str, int]:
    """Bytes of the tensors in states: basis, moments, residual, plain (AdamW of what is not projected).

    Args:
        states: for each parameter, whether it is projected, and its state.
    """
    kinds = {"basis": 0, "moments": 0, "residual": 0, "plain": 0}
    for projected, state in states:
        for key, value in state.items():
            if isinstance(value, Tensor):
                kinds[_kind(bare(key)) if projected else "plain"] += value.numel() * value.element_size()
    return kinds


def _kind(name: str) -> str:
    if name.startswith(("residual", "candidate")):
        return "residual"
    return "basis" if name.startswith("basis") else "moments"
