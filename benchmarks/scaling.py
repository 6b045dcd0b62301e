"""Several GPUs: speed, memory, bytes on the wire and loss of GaLore+ and fused AdamW, backend by backend.

Weak scaling gives every GPU the same batch. Strong scaling cuts one batch of sequences; its loss curves must agree with
one GPU's. A launch is a backend on a number of processes, which train their cells in turn. Small launches run side by
side on different GPUs. Cells that the output already holds are not run again, so a long table can be made in several
runs of the same command.

    python benchmarks/scaling.py --worlds 1 2 4 --output scaling
    python benchmarks/scaling.py --device cpu --shape tiny --worlds 1 2 --output scaling   # anywhere, in minutes
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling_table import GAP, Key, plot, read, table, weights_file
from scaling_worker import WARM_UP

from galore_trainer.run.bench.weights import SHAPES as WIDTHS

# Each of their cells has a launch to itself: DeepSpeed keeps gigabytes of a ZeRO-3 engine until the process ends.
ALONE = {"zero3"}
BACKENDS = ("ddp", "ddp layer-wise", "fsdp2", "zero2", "zero3")
LLAMA = {**WIDTHS["llama-7b"], "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**WIDTHS["tiny"], "num_hidden_layers": 2, "tie_word_embeddings": False},
    "llama-7b-8-layers": {**LLAMA, "num_hidden_layers": 8},
    "llama-7b": {**LLAMA, "num_hidden_layers": 32},
    "llama-13b": {
        **LLAMA,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "hidden_size": 5120,
        "intermediate_size": 13824,
    },
}


def cells_of(world: int, backend: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells of a launch: GaLore+ and AdamW, weak and (where several processes share a batch) strong.

    Layer-wise mode has GaLore+ alone. One process needs no weak cell beside the strong one.
    """
    cells = []
    for scaling, method in itertools.product(("weak", "strong"), ("galore_plus", "adamw")):
        if (backend == "ddp layer-wise" and method == "adamw") or scaling not in arguments.scaling:
            continue
        if world == 1 and scaling == "weak" and "strong" in arguments.scaling:
            continue
        batch = arguments.batch // world if scaling == "strong" else arguments.batch
        settings = {
            "model": SHAPES[arguments.shape],
            "method": method,
            "batch": batch,
            "length": arguments.length,
            "steps": arguments.steps if scaling == "strong" else arguments.weak_steps,
            "lr": 1e-4,
            "galore": {
                "rank": arguments.rank,
                "residual_percent": arguments.residual_percent,
                "update_proj_gap": GAP if backend == "ddp layer-wise" else arguments.gap,
            },
        }
        key = Key(arguments.shape, arguments.residual_percent, backend, world, scaling, method)
        if scaling == "strong":  # its final weights are compared with one GPU's
            settings["weights"] = str(weights_file(arguments.output, key))
        cells.append({"id": key, **settings})
    return cells


class Launch:
    """A backend on some processes, which import their libraries before their turn comes."""

    def __init__(self, world: int, backend: str, cells: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
        self.world, self.backend, self.cells, self.arguments = world, backend, cells, arguments
        cell = cells[0]["id"][-2:] if backend in ALONE else ()
        words = (arguments.shape, world, backend.replace(" ", "-"), *cell)
        self.folder = arguments.output / "-".join(map(str, words))
        self.process: subprocess.Popen[bytes] | None = None

    def prepare(self, gpus: list[int]) -> None:
        """Start its processes, which wait for their turn."""
        self.folder.mkdir(parents=True, exist_ok=True)
        turn, path = self.folder / "turn", self.folder / "plan.json"
        turn.unlink(missing_ok=True)
        plan = {
            "backend": self.backend,
            "device": self.arguments.device,
            "cells": self.cells,
            "turn": str(turn),
            "results": str(self.arguments.output / "cells.jsonl"),
            "timeout": self.arguments.timeout,
        }
        path.write_text(json.dumps(plan))
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.world)]
        worker = str(Path(__file__).with_name("scaling_worker.py"))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(64)))).split(",")
        devices = (
            {"CUDA_VISIBLE_DEVICES": ",".join(visible[i] for i in gpus)} if self.arguments.device == "cuda" else {}
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **devices}
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *words, worker, str(path)], env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def begin(self) -> None:
        """Let its processes train."""
        (self.folder / "turn").touch()

    def end(self, until: float) -> None:
        """Wait for its end; stop it at the deadline."""
        assert self.process is not None
        try:
            self.process.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait()


def rounds_of(launches: list[Launch], gpus: int) -> Iterator[list[Launch]]:
    """Launches that run side by side: with the same number of processes each, as many as there are GPUs for."""
    for world, group in itertools.groupby(launches, key=lambda launch: launch.world):
        alike = list(group)
        size = max(1, gpus // world)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def run(arguments: argparse.Namespace) -> None:
    """Run the missing cells, small numbers of processes first."""
    import torch

    gpus = torch.cuda.device_count() if arguments.device == "cuda" else max(arguments.worlds)
    done, launches = read(arguments.output), []
    for world, backend in itertools.product(sorted(arguments.worlds), arguments.backends):
        cells = [c for c in cells_of(world, backend, arguments) if c["id"] not in done]
        groups = [[c] for c in cells] if backend in ALONE else [cells]
        launches += [Launch(world, backend, group, arguments) for group in groups if group]
    deadline = time.monotonic() + arguments.limit
    rounds = list(rounds_of(launches, gpus))

    def prepare(together: list[Launch]) -> None:
        for i, launch in enumerate(together):
            launch.prepare(list(range(i * launch.world, (i + 1) * launch.world)))

    for i, together in enumerate(rounds):
        if i == 0:
            prepare(together)
        for launch in together:
            launch.begin()
        if i + 1 < len(rounds):
            prepare(rounds[i + 1])
        for launch in together:
            launch.end(deadline)
        names = ", ".join(f"{launch.backend} on {launch.world}" for launch in together)
        print(f"{time.strftime('%T')}  {names}", flush=True)
        if time.monotonic() > deadline:
            for launch in rounds[i + 1] if i + 1 < len(rounds) else []:
                launch.end(0.0)
            print("the limit is reached: the same command goes on")
            break


def main() -> None:
    """Run, print the table, write it and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b-8-layers")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--scaling", nargs="+", choices=("weak", "strong"), default=["weak", "strong"])
    parser.add_argument("--batch", type=int, default=8, help="sequences a GPU (weak), or in all (strong)")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, help="128, or 16 for the tiny shape")
    parser.add_argument("--gap", type=int, default=24, help="update_proj_gap while measuring")
    parser.add_argument("--residual-percent", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=50, help="of a strong cell")
    parser.add_argument("--weak-steps", type=int, default=WARM_UP + 26)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which nothing more is run")
    parser.add_argument("--timeout", type=int, default=120, help="seconds that a collective may take")
    parser.add_argument("--output", type=Path, default=Path("scaling"))
    arguments = parser.parse_args()
    arguments.rank = arguments.rank or (16 if arguments.shape == "tiny" else 128)
    (arguments.output / "weights").mkdir(parents=True, exist_ok=True)

    run(arguments)

    import torch

    from galore_trainer.run.results.artifacts import environment

    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    settings = {**vars(arguments), "output": None, "device": device, "environment": environment()}
    (arguments.output / "settings.json").write_text(json.dumps(settings, indent=1, default=str))
    text = table(arguments.output, arguments.shape)
    (arguments.output / "scaling.md").write_text(text)
    plot(arguments.output, arguments.shape)
    print(text)


if __name__ == "__main__":
    main()
