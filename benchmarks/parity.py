"""Several processes against one: how far apart a tiny model's weights end, for GaLore+ and for AdamW, by backend.

The training is that of the tests (``tests/distributed/script.py``: Trainer, six steps, three refreshes, accumulation 2,
clipping), in float32 and bfloat16, on two GPUs where there are two, else on CPUs. The single process runs under the
same backend. AdamW's learning rate makes its weights move about as far. In bfloat16 eps is the Trainer's default. Rows
named "ddp, rounding" show what rounding does without a second process: they compare one process that cuts the batch
into four micro-batches with one that cuts it into two.

    python benchmarks/parity.py --output parity    # parity.json, parity.md
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
from typing import Any, NamedTuple

SCRIPT = Path(__file__).parents[1] / "tests" / "distributed" / "script.py"
BACKENDS = ("ddp", "ddp layer-wise", "fsdp2", "zero1", "zero2", "zero3")
ALONE = ", rounding"  # after a backend's name: one process, the batch cut in two ways
CHOICES = [backend + ending for ending in ("", ALONE) for backend in BACKENDS]
METHODS: dict[str, dict[str, Any]] = {
    "GaLore+": {"residual_percent": 0.0},
    "GaLore+, residual": {},
    "AdamW": {"adamw": 3.5e-3},
}


class Case(NamedTuple):
    """One training."""

    backend: str
    dtype: str
    method: str
    processes: int = 1
    accumulation: int = 2

    def folder(self, parent: Path) -> Path:
        """Where it writes."""
        return parent / "-".join(map(str, self)).replace(",", "").replace(" ", "-")

    def weights(self, parent: Path) -> dict[str, Any]:
        """Its final weights by name, of the uninterrupted run; the file holds the resumed run's too."""
        import torch

        whole, _ = torch.load(self.folder(parent) / "found.pt", weights_only=True)
        return whole["weights"]


def launch(case: Case, gpus: list[str], model: Path, folder: Path) -> str | None:
    """Train one case; returns None, or the last line of its error."""
    settings = {**METHODS[case.method], "accumulation": case.accumulation}
    if case.dtype == "bfloat16":
        settings |= {"bf16": True, "eps": 1e-8}
    if "layer-wise" in case.backend:
        settings["layerwise"] = True
    backend, output = case.backend.split()[0], case.folder(folder)
    output.mkdir()
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes), str(SCRIPT)]
    where = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    run = subprocess.run(
        [sys.executable, *words, backend, str(model), str(output), json.dumps(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **where},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in run.stderr.split("torch.distributed.elastic")[0].splitlines() if "Error" in line]
    return None if run.returncode == 0 else (lines or ["failed"])[-1][:200]


def pair_of(backend: str, dtype: str, method: str) -> tuple[Case, Case]:
    """The cases that a row compares: one process with two, or with itself on smaller micro-batches."""
    one = Case(backend.removesuffix(ALONE), dtype, method)
    return one, one._replace(accumulation=4) if backend.endswith(ALONE) else one._replace(processes=2)


def compare(cases: tuple[Case, Case], folder: Path, start: dict[str, Any]) -> dict[str, Any]:
    """Distances between the weights of two cases, and between those of the first and ``start``."""
    import torch

    one, two = (case.weights(folder) for case in cases)
    apart = torch.cat([(two[name].float() - w.float()).abs().flatten().cpu() for name, w in one.items()])
    moved = torch.cat([(w.float().cpu() - start[name]).abs().flatten() for name, w in one.items()])
    return {
        "max": apart.max().item(),
        "mean": apart.mean().item(),
        "moved": moved.mean().item(),
        "moved_max": moved.max().item(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """All rows in Markdown, those that failed with their errors."""
    columns = ("backend", "precision", "method", "largest", "mean", "mean / AdamW's", "moved, mean", "moved, largest")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    adamw = {(row["backend"], row["dtype"]): row.get("mean") for row in rows if row["method"] == "AdamW"}
    for row in rows:
        name = f"| {row['backend']} | {row['dtype']} | {row['method']} | "
        if "error" in row:
            lines.append(f"{name}{row['error'][:60]} |" + " |" * 4)
            continue
        kind = (row["backend"].replace(" layer-wise", ""), row["dtype"])
        peer = adamw.get(kind) if row["method"] != "AdamW" else None
        times = f"{row['mean'] / peer:.2f}" if peer else ""
        figures = (f"{row[key]:.1e}" for key in ("moved", "moved_max"))
        lines.append(f"{name}{row['max']:.1e} | {row['mean']:.1e} | {times} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every case, print a table, write it and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=CHOICES, default=CHOICES)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--jobs", type=int, default=1, help="launches at a time")
    parser.add_argument("--output", type=Path, default=Path("parity"), help="a file's name without its ending")
    arguments = parser.parse_args()

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from galore_trainer.run.results.artifacts import environment

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=111,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    pairs = [visible[i : i + 2] for i in range(0, gpus - 1, 2)] or [[]]
    device = torch.cuda.get_device_name() if gpus >= 2 else "cpu"
    kinds = [
        kind
        for kind in itertools.product(arguments.backends, arguments.dtypes, METHODS)
        if not ("layer-wise" in kind[0] and kind[2] == "AdamW")
    ]
    cases = dict.fromkeys(case for kind in kinds for case in pair_of(*kind))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(arguments.jobs) as pool:
        folder, model = Path(temporary), Path(temporary) / "model"
        LlamaForCausalLM(config).save_pretrained(model)
        start = LlamaForCausalLM.from_pretrained(model).state_dict()
        launched = {
            case: pool.submit(launch, case, pairs[i % len(pairs)], model, folder) for i, case in enumerate(cases)
        }
        for kind in kinds:
            one, other = pair_of(*kind)
            error = launched[one].result() or launched[other].result()
            figures = {"error": error} if error else compare((one, other), folder, start)
            rows.append({**dict(zip(("backend", "dtype", "method"), kind, strict=True)), **figures})
            content = {"device": device, "gpus": gpus, "environment": environment(), "rows": rows}
            Path(f"{arguments.output}.json").write_text(json.dumps(content, indent=1))  # the run may be cut off
    Path(f"{arguments.output}.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
