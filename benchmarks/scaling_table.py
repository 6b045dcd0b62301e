"""The table and the plot of ``scaling.py``, from the lines that its launches wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

GIB = 1 << 30
# Costs a step are given for this update_proj_gap; layer-wise mode, whose refreshes are staggered, trains with it.
GAP = 200
ORDER = ("ddp", "ddp layer-wise", "fsdp2", "zero2", "zero3")
COLUMNS = {  # title: digits after the point
    "step ms": 1,
    "refresh ms": 0,
    "optimizer ms": 1,
    "tokens/s": 0,
    "efficiency": 3,
    "time / AdamW": 3,
    "peak GiB": 2,
    "peak / AdamW": 3,
    "sent MB a step": 0,
    "loss": 3,
    "loss gap": 4,
    "moved": 6,
    "distance": 7,
    "distance / AdamW": 2,
}


class Key(NamedTuple):
    """The cell that a line belongs to."""

    shape: str
    residual: float
    backend: str
    world: int
    scaling: str
    method: str

    @property
    def one(self) -> Key:
        """The cell on one GPU; it trains the whole batch, so that weak and strong are the same."""
        return self._replace(world=1, scaling="strong")

    @property
    def adamw(self) -> Key:
        """AdamW under the same backend; layer-wise mode is DDP's."""
        return self._replace(method="adamw", backend=self.backend.split()[0], residual=0.0)


def read(output: Path) -> dict[Key, dict[str, Any]]:
    """Every cell that has been run: the newest line of each."""
    path = output / "cells.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {Key(*row["id"]): row for row in map(json.loads, lines)}


def weights_file(output: Path, key: Key) -> Path:
    """The file with some entries of each of a cell's final weights."""
    return output / "weights" / ("-".join(map(str, key)).replace(" ", "-") + ".pt")


def step_seconds(row: dict[str, Any]) -> tuple[float, float | None]:
    """Seconds of an ordinary step (median), and those that a refresh adds; None without a timed refresh."""
    ordinary = statistics.median(s for i, s in enumerate(row["seconds"]) if i not in row["refresh_steps"])
    extra = [row["seconds"][i] - ordinary for i in row["refresh_steps"] if i < len(row["seconds"])]
    return ordinary, statistics.median(extra) if extra else None


def amortised(row: dict[str, Any]) -> float:
    """Seconds of a step with its share of a refresh every ``GAP`` steps; staggered refreshes are in every step."""
    ordinary, extra = step_seconds(row)
    return statistics.mean(row["seconds"]) if row["staggered"] else ordinary + (extra or 0.0) / GAP


def wire_bytes(collectives: dict[str, Any], world: int) -> float:
    """Bytes that a process sends, from the sizes given to collectives; they are taken to be ring algorithms."""
    total = 0.0
    for key, sizes in collectives.items():
        kind = key.split()[0].lower()
        if "allreduce" in kind:
            total += 2 * sizes["in"] * (world - 1) / world
        elif "gather" in kind:
            total += sizes["in"] * (world - 1)
        elif "reduce" in kind:  # reduce-scatter, and to one process
            total += sizes["in"] * (world - 1) / world
        elif "broadcast" in kind:
            total += sizes["in"]
    return total


def distance(one: Path, other: Path) -> float | None:
    """Mean distance between the final weights of two cells; None where a file is missing."""
    import torch

    if not (one.exists() and other.exists()):
        return None
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    return torch.cat([(a[name] - w).abs() for name, w in b.items()]).mean().item()


def line_of(key: Key, rows: dict[Key, dict[str, Any]], output: Path) -> dict[str, float | None]:
    """A cell's figures, against one GPU and against AdamW under the same backend."""
    row, one, adamw = rows[key], rows.get(key.one), rows.get(key.adamw)
    seconds, (ordinary, extra) = amortised(row), step_seconds(row)
    parts = [
        statistics.median(values) for name, values in row.get("optimizer_seconds", {}).items() if name != "refresh"
    ]
    line: dict[str, float | None] = {
        "step ms": 1000 * ordinary,
        "refresh ms": None if extra is None else 1000 * extra,
        "optimizer ms": 1000 * sum(parts) if parts else None,
        "tokens/s": row["tokens"] / seconds,
        "peak GiB": row["peak"] / GIB if row["peak"] else None,
        "loss": statistics.mean(row["loss"][-5:]),
        "sent MB a step": wire_bytes(row["collectives"], key.world) / 1e6 if row["collectives"] else None,
    }
    line["moved"] = row.get("moved")
    if adamw and "error" not in adamw:
        line["time / AdamW"] = seconds / amortised(adamw)
        line["peak / AdamW"] = row["peak"] / adamw["peak"] if row["peak"] and adamw["peak"] else None
    if one and "error" not in one and key.world > 1:
        line["efficiency"] = row["tokens"] / seconds / (one["tokens"] / amortised(one)) / key.world
        if key.scaling == "strong":
            pairs = zip(row["loss"], one["loss"], strict=False)
            line["loss gap"] = statistics.mean(abs(a - b) for a, b in pairs)
            line["distance"] = distance(weights_file(output, key), weights_file(output, key.one))
            of_adamw = distance(weights_file(output, key.adamw), weights_file(output, key.adamw.one))
            if line["distance"] and of_adamw:
                line["distance / AdamW"] = line["distance"] / of_adamw
    return line


def table(output: Path, shape: str) -> str:
    """All cells of a model's shape as Markdown; errors stay in it."""
    rows = read(output)
    text = [f"| backend | GPUs | scaling | method | {' | '.join(COLUMNS)} |", "|---" * (4 + len(COLUMNS)) + "|"]
    for key in sorted(rows, key=lambda k: (k.scaling, ORDER.index(k.backend), k.method, k.residual, k.world)):
        if key.shape != shape:
            continue
        method = key.method + (f", residual {key.residual} %" if key.residual and key.method != "adamw" else "")
        name = f"| {key.backend} | {key.world} | {key.scaling} | {method} | "
        if "error" in rows[key]:
            text.append(name + f"{rows[key]['error'][:60]} |" + " |" * (len(COLUMNS) - 1))
            continue
        line = line_of(key, rows, output)
        shown = (f"{line[c]:.{n}f}" if line.get(c) is not None else "" for c, n in COLUMNS.items())
        text.append(name + " | ".join(shown) + " |")
    text += ["", *wire_of_layerwise(rows, shape)]
    return "\n".join(text) + "\n"


def wire_of_layerwise(rows: dict[Key, dict[str, Any]], shape: str) -> Iterator[str]:
    """What layer-wise mode hands to all-reduce for the projected weights, against their dense gradients."""
    for key, row in rows.items():
        if key.shape != shape or not row.get("kept"):
            continue
        dense = 2 * row["parameters"]["projected"]
        ordinary = [step for step in row["kept"][1:] if "whole" not in step]  # in which no weight is refreshed
        kinds = {kind: 100 * size / dense for kind, size in (ordinary[-1] if ordinary else {}).items()}
        shares = ", ".join(f"{kind} {share:.3f}" for kind, share in kinds.items())
        usual = f"a step without a refresh hands over {sum(kinds.values()):.3f} % ({shares}), " if kinds else ""
        first = 100 * sum(row["kept"][0].values()) / dense
        mean = 100 * statistics.mean(sum(step.values()) for step in row["kept"][1:]) / dense
        yield (
            f"{key.backend} on {key.world}, {key.scaling}, residual {key.residual} %: of the projected weights' dense "
            f"bfloat16 gradients ({dense / 1e6:.0f} MB) {usual}a step hands over {mean:.2f} % on average (gap {GAP}, "
            f"staggered), the first {first:.2f} %; beside them the plain weights' gradients, "
            f"{2 * row['parameters']['plain'] / 1e6:.0f} MB.\n"
        )


def plot(output: Path, shape: str) -> None:
    """The strong cells' loss curves, one panel a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {k: r for k, r in read(output).items() if k.shape == shape and k.scaling == "strong" and "loss" in r}
    methods = sorted({k.method for k in rows}) or [""]
    figure, axes = plt.subplots(1, len(methods), figsize=(6 * len(methods), 4), squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        for key, row in sorted(rows.items()):
            if key.method == method:
                axis.plot(row["loss"], label=f"{key.backend}, {key.world}", linewidth=1)
        axis.set(title=method, xlabel="step", ylabel="loss")
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(output / "loss.png", dpi=120)
