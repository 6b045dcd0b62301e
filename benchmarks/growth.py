"""What a step and a refresh cost against rank, width, layers and density of the residual.

    python benchmarks/growth.py --json growth.json              # on a GPU: bfloat16, Llama's shapes
    python benchmarks/growth.py --plot growth.png --from growth.json

Each point is a fresh optimizer on the linear weights of some Llama layers with random gradients. One setting varies;
the others are those of LLaMA-7B at rank 128, with 16 layers, or 4 where the width varies. A step's milliseconds are a
quarter of four steps in a row, because the host runs ahead of the device in training; medians of five. The curve
against the gap is step + refresh / gap. On a CPU everything is small and only shows that the script works.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from galore_trainer.run.bench.measure import copy_bandwidth, take_turns
from galore_trainer.run.bench.weights import SHAPES, Bench, galore_plus, least_bytes, linear_weights
from galore_trainer.run.results.artifacts import environment

IN_A_ROW = 4
GAPS = (10, 20, 50, 100, 200, 500, 1000)
AXES: dict[str, tuple[float, ...]] = {
    "rank": (8, 16, 32, 64, 128, 256, 512),
    "width": (1024, 2048, 4096, 8192),
    "layers": (1, 2, 4, 8, 16, 32),
    "density": (0.0, 0.3, 0.6, 1.2, 2.4, 4.8),
}
SMALL: dict[str, tuple[float, ...]] = {"rank": (4, 8), "width": (128, 256), "layers": (1, 2), "density": (0.0, 2.0)}
UNITS = {"rank": "rank", "width": "hidden size", "layers": "layers", "density": "residual, % of entries"}


def shape_of(width: int, head: int) -> str:
    """Add a Llama with this hidden size and LLaMA-7B's proportions to ``SHAPES``; returns its name there."""
    name = f"width-{width}"
    SHAPES[name] = {
        "hidden_size": width,
        "intermediate_size": width * 43 // 16,
        "num_attention_heads": width // head,
        "num_key_value_heads": width // head,
        "vocab_size": 32,
    }
    return name


def measure(bench: Bench) -> dict[str, float]:
    """Milliseconds of a step and of a refresh, and the bytes that a step has to move at least."""
    model = linear_weights(bench)
    residual = {"residual_percent": bench.residual_percent, "residual_warmup_steps": 0}
    optimizer = galore_plus(bench, model, subspace_iterations=1, **residual)
    optimizer.step()

    def steps() -> None:
        for _ in range(IN_A_ROW):
            optimizer.step()

    step = take_turns({"steps": steps}, bench.rounds, bench.torch_device)["steps"]
    refresh_everything = optimizer.refresh_now
    refresh = take_turns({"refresh": refresh_everything}, bench.rounds, bench.torch_device)["refresh"]
    low, high = step.quartiles
    return {
        "step": step.median / IN_A_ROW,
        "low": low / IN_A_ROW,
        "high": high / IN_A_ROW,
        "refresh": refresh.median,
        "bytes": least_bytes(optimizer),
    }


def points(device: str) -> Iterator[tuple[str, float, Bench]]:
    """Every point: the axis that varies, its value there, and the settings to measure with."""
    cuda = device == "cuda"
    usual: dict[str, Any] = {"rank": 128, "width": 4096, "layers": 16, "density": 0.0}
    if not cuda:
        usual = {"rank": 8, "width": 128, "layers": 2, "density": 0.0}
    for axis, values in (AXES if cuda else SMALL).items():
        for value in values:
            at = {**usual, axis: value}
            if axis == "width" and cuda:
                at["layers"] = 4
            bench = Bench(
                shape=shape_of(int(at["width"]), 128 if cuda else 32),
                layers=int(at["layers"]),
                rank=int(at["rank"]),
                residual_percent=float(at["density"]),
                dtype="bfloat16" if cuda else "float32",
                rounds=5,
                device=device,
            )
            yield axis, value, bench


def plot(content: dict[str, Any], path: Path) -> None:
    """Five small plots: milliseconds against each axis, and against the gap."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.2), layout="constrained")
    panels = figure.subplots(1, 5)
    for axis, panel in zip(AXES, panels, strict=False):
        rows = [row for row in content["points"] if row["axis"] == axis]
        x = [row["value"] for row in rows]
        floor = [1e3 * row["bytes"] / content["bandwidth"] for row in rows]
        panel.plot(x, [row["step"] for row in rows], marker="o", label="step")
        panel.plot(x, floor, color="gray", linestyle=":", label="bytes / bandwidth")
        if axis != "density":
            panel.plot(x, [row["refresh"] for row in rows], marker="s", label="refresh")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
        panel.set_xlabel(UNITS[axis])
    usual = next(row for row in reversed(content["points"]) if row["axis"] == "layers" and row["value"] <= 16)
    panels[4].plot(GAPS, [usual["step"] + usual["refresh"] / gap for gap in GAPS], marker="o")
    panels[4].set_xscale("log")
    panels[4].set_xlabel("update_proj_gap")
    panels[0].set_ylabel("ms")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write what was measured")
    parser.add_argument("--plot", type=Path, help="write curves as PNG")
    parser.add_argument("--from", dest="source", type=Path, help="plot an earlier --json in place of measuring")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.source is not None:
        content = json.loads(args.source.read_text(encoding="utf-8"))
    else:
        cuda = args.device == "cuda"
        content = {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "environment": environment(),
            "bandwidth": copy_bandwidth(torch.device(args.device)),
            "points": [],
        }
        print(f"{'axis':<10}{'value':>8}{'step, ms':>12}{'floor, ms':>12}{'refresh, ms':>14}")
        for axis, value, bench in points(args.device):
            point = measure(bench)
            content["points"].append({"axis": axis, "value": value, **point})
            floor = 1e3 * point["bytes"] / content["bandwidth"]
            print(f"{axis:<10}{value:>8g}{point['step']:>12.3f}{floor:>12.3f}{point['refresh']:>14.1f}", flush=True)
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
            if args.json is not None:
                args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        plot(content, args.plot)


if __name__ == "__main__":
    main()
