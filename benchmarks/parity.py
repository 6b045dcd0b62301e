"""Several processes against one: how far apart a tiny model's weights end, for GaLore+ and for AdamW, by backend.

The training is that of the tests (``tests/distributed/script.py``: Trainer, six steps, three refreshes, accumulation 2,
clipping), in float32 and bfloat16, on two GPUs where there are two, else on CPUs. One process runs under the same
backend. AdamW's learning rate makes its weights move about as far.

    python benchmarks/parity.py --output parity.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "tests" / "distributed" / "script.py"
BACKENDS = ("ddp", "ddp layer-wise", "fsdp2", "zero1", "zero2", "zero3")
METHODS: dict[str, dict[str, Any]] = {
    "GaLore+": {"residual_percent": 0.0}, "GaLore+, residual": {}, "AdamW": {"adamw": 1e-2},
}  # fmt: skip


def folder_of(folder: Path, case: tuple[str, str, str, int]) -> Path:
    """Where a case's training writes."""
    return folder / "-".join(map(str, case)).replace(" ", "-")


def weights_of(folder: Path, case: tuple[str, str, str, int]) -> dict[str, Any]:
    """What a case ended with, by name; the run that was resumed comes second."""
    import torch

    whole, _ = torch.load(folder_of(folder, case) / "found.pt", weights_only=True)
    return whole["weights"]


def launch(case: tuple[str, str, str, int], gpus: list[str], model: Path, folder: Path) -> str | None:
    """Train one case; its error's last line where it fails."""
    backend, dtype, method, world = case
    settings = {**METHODS[method], "bf16": dtype == "bfloat16"}
    if backend == "ddp layer-wise":
        settings["layerwise"] = True
    output = folder_of(folder, case)
    output.mkdir()
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), str(SCRIPT)]
    where = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    run = subprocess.run(
        [sys.executable, *words, backend.split()[0], str(model), str(output), json.dumps(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **where}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    lines = [line for line in run.stderr.split("torch.distributed.elastic")[0].splitlines() if "Error" in line]
    return None if run.returncode == 0 else (lines or ["failed"])[-1][:200]


def main() -> None:
    """Run every case, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--jobs", type=int, default=1, help="launches at a time")
    parser.add_argument("--output", type=Path, default=Path("parity.json"))
    arguments = parser.parse_args()

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from galore_trainer.run.artifacts import environment

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=111, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    pairs = [visible[i : i + 2] for i in range(0, gpus - 1, 2)] or [[]]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, model = Path(temporary), Path(temporary) / "model"
        LlamaForCausalLM(config).save_pretrained(model)
        start = LlamaForCausalLM.from_pretrained(model).state_dict()
        kinds = [
            kind
            for kind in itertools.product(arguments.backends, arguments.dtypes, METHODS)
            if kind[0] != "ddp layer-wise" or kind[2] != "AdamW"
        ]
        cases = [(*kind, world) for kind in kinds for world in (1, 2)]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            failed = list(pool.map(lambda i: launch(cases[i], pairs[i % len(pairs)], model, folder), range(len(cases))))
        errors = dict(zip(cases, failed, strict=True))
        for kind in kinds:
            row: dict[str, Any] = dict(zip(("backend", "dtype", "method"), kind, strict=True))
            wrong = errors[(*kind, 1)] or errors[(*kind, 2)]
            if wrong:
                rows.append({**row, "error": wrong})
                print(f"{kind[0]:<16}{kind[1]:<10}{kind[2]:<20}{wrong}")
                continue
            one, two = (weights_of(folder, (*kind, world)) for world in (1, 2))
            apart = torch.cat([(two[name].float() - w.float()).abs().flatten().cpu() for name, w in one.items()])
            moved = torch.cat([(w.float().cpu() - start[name]).abs().flatten() for name, w in one.items()])
            row |= {"max": apart.max().item(), "mean": apart.mean().item(), "moved": moved.mean().item()}
            rows.append(row)
            print(f"{kind[0]:<16}{kind[1]:<10}{kind[2]:<20}max {row['max']:.2e}  mean {row['mean']:.2e}  "
                  f"weights moved {row['moved']:.2e}")  # fmt: skip
    device = torch.cuda.get_device_name() if gpus >= 2 else "cpu"
    arguments.output.write_text(json.dumps({"device": device, "environment": environment(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
