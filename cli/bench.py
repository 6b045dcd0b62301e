"""``galore-ft bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from galore_trainer.cli.options import Debug
from galore_trainer.errors import OptionError

CHOICES = ("step", "ranks", "small", "refresh", "e2e", "all")

What = Annotated[str, typer.Argument(metavar="step|ranks|small|refresh|e2e|all", help="What to time.")]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the ratios, one row a line of the table.")
]
Details = Annotated[Path | None, typer.Option("--details", metavar="FILE", help="Write every timing, too.")]
Shape = Annotated[
    str | None,
    typer.Option("--shape", help="llama-7b (default on a GPU), llama3-8b, smollm2-135m, tiny; small has its own."),
]
Layers = Annotated[int | None, typer.Option("--layers", min=1, help="Layers of step, ranks and refresh (16).")]
ModelLayers = Annotated[int | None, typer.Option("--model-layers", min=1, help="Layers of the model that trains (8).")]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="Of GaLore+ and galore-torch (128), but in ranks.")]
Rounds = Annotated[int | None, typer.Option("--rounds", min=1, help="How often each method is timed (20).")]
Steps = Annotated[int | None, typer.Option("--steps", min=2, help="Of each run with refreshes (200).")]
Kernels = Annotated[str | None, typer.Option("--kernels", help="auto (default), triton or torch.")]
Profile = Annotated[bool, typer.Option("--profile", help="Also list the kernels of a GaLore+ step, on a GPU.")]
Device = Annotated[str | None, typer.Option("--device", help="cuda, or cpu for a small trial; what there is.")]

SMALL = {
    "shape": "tiny",
    "layers": 2,
    "model_layers": 2,
    "rank": 8,
    "lora_rank": 4,
    "dtype": "float32",
    "batch_size": 2,
    "length": 32,
    "gap": 10,
    "short_gap": 5,
    "rounds": 5,
    "steps": 20,
}


def bench(
    what: What = "all",
    json: Json = None,
    details: Details = None,
    shape: Shape = None,
    layers: Layers = None,
    model_layers: ModelLayers = None,
    rank: Rank = None,
    rounds: Rounds = None,
    steps: Steps = None,
    kernels: Kernels = None,
    device: Device = None,
    profile: Profile = False,
    debug: Debug = False,
) -> None:
    """Time GaLore+ against fused AdamW, 8-bit AdamW, galore-torch, LoRA and DoRA, which take turns in one run.

    Ratios come last, each with the most that it should be. On a CPU everything is small: it shows that the command
    works, and nothing about speed.
    """
    if what not in CHOICES:
        raise OptionError("bench", what, f"one of {', '.join(CHOICES)}")
    import torch

    from galore_trainer.run.bench.run import run_bench
    from galore_trainer.run.bench.weights import SHAPES, Bench

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cuda", "cpu") or (device == "cuda" and not torch.cuda.is_available()):
        raise OptionError("--device", device, "cuda where there is a GPU, or cpu")
    if profile and device != "cuda":
        raise OptionError("--profile", f"with --device {device}", "a GPU, whose kernels it lists", "Leave it out.")
    if shape is not None and shape not in SHAPES:
        raise OptionError("--shape", shape, f"one of {', '.join(SHAPES)}")
    options: dict[str, Any] = {
        "shape": shape,
        "layers": layers,
        "model_layers": model_layers,
        "rank": rank,
        "rounds": rounds,
        "steps": steps,
        "kernels": kernels,
    }
    settings = {**(SMALL if device == "cpu" else {}), **{k: v for k, v in options.items() if v is not None}}
    parts = list(CHOICES[:-1]) if what == "all" else [what]
    run_bench(Bench(device=device, profile=profile, **settings), parts, json, details, say=typer.echo)
