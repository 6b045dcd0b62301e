"""The table of projected, plain and frozen weights that a run shows at its start."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.fields import idle_settings
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.param_groups import scale_of
from galore_trainer.tables import TextTable, human_bytes
from galore_trainer.targets.groups import Weight
from galore_trainer.targets.names import logical_name

NUMERIC = {"parameters", "share", "rank", "lr", "state"}
COLUMNS = ("weights", "kind", "shape", "parameters", "share", "side", "rank", "heads", "lr", "state")


@dataclasses.dataclass
class _Row:
    cells: tuple[str, ...]
    parameters: int = 0
    count: int = 0
    state: int = 0


def weight_table(optimizer: GaLoreAdamW, model: nn.Module | None = None) -> str:
    """One line for each kind of weight: equal weights of all layers are counted together.

    Args:
        optimizer: its groups say what is projected and with which learning rate, its ``notes`` why a target is not.
        model: adds frozen parameters, which are in no group.

    Returns:
        Text with columns ``COLUMNS``; ``lr`` is the effective one (lr x scale, lr x plain_lr_ratio) at the peak of the
        schedule, ``state`` the bytes of optimizer state; ``heads`` reads "9, one lends" for a shared basis, and
        "unknown: joint" where an attention weight fell back to joint. The line of all projected weights names the
        residual in force, and whether it corrects moments. Notes below name settings that have no effect.
    """
    return str(plan_table(_weights(optimizer, model), optimizer.config))


def show_weights(optimizer: GaLoreAdamW, model: nn.Module | None = None) -> None:
    """Print ``weight_table``, fitted to a terminal where there is one."""
    plan_table(_weights(optimizer, model), optimizer.config).show()


def plan_table(weights: Iterable[tuple[Weight, str]], config: GaLoreConfig) -> TextTable:
    """The table of ``weight_table`` for weights and their learning rates in words."""
    rows: dict[tuple[str, ...], _Row] = {}
    for weight, lr in weights:
        name = re.sub(r"\.\d+\.", ".*.", weight.name.removesuffix(".weight"))
        shape = "x".join(map(str, weight.parameter.shape))
        side, rank, heads = ((_join(f(m) for m in weight.matrices)) for f in (_side, _rank, _heads))
        heads = "unknown: joint" if weight.falls_back(config) else heads
        cells = (name, weight.kind, shape, side, rank, heads, lr, weight.note)
        row = rows.setdefault(cells, _Row(cells))
        row.parameters += weight.parameter.numel()
        row.count += 1
        row.state += sum(weight.state_bytes(config).values())
    total = sum(r.parameters for r in rows.values()) or 1
    lines: list[tuple[str, ...]] = []
    for row in sorted(rows.values(), key=lambda r: (_ORDER.index(r.cells[1]), -r.parameters)):
        name, kind, shape, side, rank, heads, lr, note = row.cells
        times = f"{row.count} x {name}" if row.count > 1 else name
        kind += f" ({note})" if note else ""
        share = f"{row.parameters / total:.1%}"
        lines.append((times, kind, shape, f"{row.parameters:,}", share, side, rank, heads, lr, human_bytes(row.state)))
    for kind in _ORDER:
        members = [r for r in rows.values() if r.cells[1] == kind]
        if members:
            count = sum(r.parameters for r in members)
            state = human_bytes(sum(r.state for r in members))
            residual = f"residual {config.resolved_residual}" if kind == "projected" else ""
            if residual and config.residual_mode == "moments":
                residual += " (moments, by torch)"
            lines.append((f"all {kind}", residual, "", f"{count:,}", f"{count / total:.1%}", "", "", "", "", state))
    return TextTable(COLUMNS, lines, NUMERIC, [f"note: {sentence}" for sentence in idle_settings("galore", config)])


_ORDER = ("projected", "plain", "frozen")


def _weights(optimizer: GaLoreAdamW, model: nn.Module | None) -> Iterable[tuple[Weight, str]]:
    seen = set()
    for group in optimizer.param_groups:
        lr = float(group.get("initial_lr", group["lr"]))
        matrices = group.get("matrices", [()] * len(group["names"]))
        for name, shape, m in zip(group["names"], optimizer.placement.shapes(group), matrices, strict=True):
            seen.add(name)
            scales = [scale_of(group, optimizer.config, matrix) for matrix in m] or [1.0]
            rates = _join(f"{lr * scale:.3g}" for scale in scales)
            yield Weight(name, _stand_in(shape, trained=True), tuple(m), optimizer.notes.get(name, "")), rates
    for full_name, p in model.named_parameters() if model is not None else ():
        if logical_name(full_name) not in seen:
            yield Weight(logical_name(full_name), _stand_in(getattr(p, "ds_shape", p.shape), trained=False)), "-"


def _stand_in(shape: Iterable[int], *, trained: bool) -> nn.Parameter:
    """A weight of a shape: the one in the group may be a shard by now."""
    return nn.Parameter(torch.empty(tuple(shape), dtype=torch.float32, device="meta"), requires_grad=trained)


def _side(m: LogicalMatrix) -> str:
    return m.side


def _rank(m: LogicalMatrix) -> str:
    return str(m.rank)


def _heads(m: LogicalMatrix) -> str:
    if not m.head_dim:
        return f"{m.blocks} experts" if m.blocks > 1 else "-"
    heads = m.blocks * m.heads_per_block
    if m.blocks == heads:
        return f"{heads}, own bases"
    lend = "one lends" if m.lenders == 1 else f"{m.lenders} lend"
    return f"{heads}, {lend}" if m.blocks == 1 else f"{heads} in {m.blocks} groups, {lend} in each"


def _join(parts: Iterable[Any]) -> str:
    return " / ".join(dict.fromkeys(map(str, parts))) or "-"
