"""Peak memory of one training step, method by method, measured on a GPU beside what ``galore-ft estimate`` says.

Random weights of a given shape, bfloat16, gradient checkpointing, plain PyTorch loop: forward, backward, clipping and
step, ``--steps`` times. The first step refreshes. A residual begins at a weight's second refresh, so rows with one
first train a whole gap on short texts. galore-torch computes the SVDs of its first and last layer; the layers between
get copies. Every row has a process to itself, and stays in the table if it runs out of memory.

    python benchmarks/memory.py --shape llama-7b --length 512 --output memory.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from pathlib import Path
from typing import Any

from galore_trainer.run.bench.weights import SHAPES as WIDTHS

GIB = 1 << 30
SHORT = 16
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
    **{
        name: {**WIDTHS[name], "num_hidden_layers": 32, "tie_word_embeddings": False}
        for name in ("llama-7b", "llama3-8b")
    },
}
LAYERWISE = {"method": "galore_plus, layer-wise"}
EIGHT_BIT_ENDS = {"plain_state_bits": 8}
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"method": "adamw"}),
    ("AdamW 8-bit", {"method": "adamw_8bit"}),
    ("LoRA", {"method": "lora"}),
    ("DoRA", {"method": "dora"}),
    ("galore-torch", {"method": "galore_torch"}),
    ("GaLore+", {"method": "galore_plus"}),
    ("GaLore+ layer-wise", LAYERWISE),
    ("GaLore+ layer-wise, 8-bit embeddings", {**LAYERWISE, **EIGHT_BIT_ENDS}),
    ("GaLore+ layer-wise, frozen embeddings", {**LAYERWISE, "embeddings": "frozen"}),
    (
        "GaLore+ layer-wise, frozen embeddings, residual 1.2 %",
        {**LAYERWISE, "embeddings": "frozen", "residual_percent": 1.2},
    ),
    (
        "GaLore+ layer-wise, all state 8-bit, residual 1.2 %",
        {**LAYERWISE, **EIGHT_BIT_ENDS, "state_bits": 8, "basis_bits": 8, "residual_percent": 1.2},
    ),
]


def settings_of(row: dict[str, Any], arguments: argparse.Namespace) -> Any:
    """The run's configuration, which ``estimate`` and the measurement share."""
    from galore_trainer.run.settings.run_config import RunConfig

    galore = {"rank": arguments.rank, "residual_percent": 0.0, "residual_warmup_steps": 0}
    galore |= {key: value for key, value in row.items() if key != "method"}
    return RunConfig.from_dict(
        {
            "model_name_or_path": arguments.folder,
            "dtype": "bfloat16",
            "max_length": arguments.length,
            "per_device_train_batch_size": 1,
            "gradient_checkpointing": True,
            "galore": galore,
            "lora": {"rank": arguments.rank, "alpha": 2 * arguments.rank},
            "use_cpu": arguments.device == "cpu",
        }
    )


def make(config: Any, method: str, device: str) -> tuple[Any, Any]:
    """A model with random weights on the device, and the method's optimizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from galore_trainer.hf.build import galore_groups
    from galore_trainer.optim.galore_adamw import GaLoreAdamW
    from galore_trainer.run.memory.estimate import method_settings
    from galore_trainer.run.models.adapters import add_adapters

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(config.model_name_or_path), dtype=torch.bfloat16
        ).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if method in ("lora", "dora"):
        model.enable_input_require_grads()
        model = add_adapters(model, config.lora, seed=0, dora=method == "dora")
    trained = [p for p in model.parameters() if p.requires_grad]
    if method == "adamw_8bit":
        import bitsandbytes as bnb

        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):  # as the Trainer asks for
                bnb.optim.GlobalOptimManager.get_instance().register_module_override(
                    module, "weight", {"optim_bits": 32}
                )
        return model, bnb.optim.AdamW(trained, lr=1e-5, optim_bits=8)
    if not method.startswith("galore"):
        return model, torch.optim.AdamW(trained, lr=1e-5, fused=True)
    galore = method_settings(config.galore, method, config.galore.rank)
    if method == "galore_torch":
        from galore_trainer.run.training.packages import PackageFactory

        adam: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
        return model, PackageFactory()(model, method=method, config=galore, **adam)
    return model, GaLoreAdamW(galore_groups(model, galore, lr=1e-5, weight_decay=0.0), galore, lr=1e-5)


def copy_most_svds(optimizer: Any, layers: int) -> None:
    """Let galore-torch compute the SVDs of the first and last layer alone: seconds, not minutes, in the same memory."""
    import torch

    matrices = sum(len(group["params"]) for group in optimizer.param_groups if "rank" in group)
    of_last = matrices - matrices // layers
    svd, kept, calls = torch.linalg.svd, dict[Any, Any](), itertools.count()

    def copied(matrix: Any, **options: Any) -> Any:
        number, known = next(calls), kept.get(matrix.shape)
        if known is not None and number < of_last:
            return tuple(part.to(matrix.device) for part in known)
        factors = svd(matrix, **options)
        kept[matrix.shape] = [part.cpu() for part in factors]
        return factors

    torch.linalg.svd = copied


def measure(row: dict[str, Any], arguments: argparse.Namespace, results: Any, turn: Any) -> None:
    """Wait for the turn, train some steps in this process, and report the peak."""
    import torch
    import transformers  # noqa: F401  imported while another row is measured

    config, method, device = settings_of(row, arguments), row["method"], arguments.device
    figures: dict[str, Any] = {"peak": None, "error": None}
    turn.wait()
    try:
        model, optimizer = make(config, method, device)
        if method == "galore_torch":
            copy_most_svds(optimizer, SHAPES[arguments.shape]["num_hidden_layers"])
        vocabulary = SHAPES[arguments.shape]["vocab_size"]
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first = config.galore.update_proj_gap + 1 if row.get("residual_percent") else 0
        for step in range(first + arguments.steps):
            length = SHORT if step < first else arguments.length
            ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(step)).to(device)
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
            figures["peak"] = torch.cuda.max_memory_allocated()
            figures["reserved"] = torch.cuda.max_memory_reserved()
        from galore_trainer.run.results.figures import optimizer_figures

        figures["state"] = optimizer_figures(optimizer)["optimizer_state_bytes"]
    except Exception as error:  # running out of memory, or an error of a library, is a row of the table
        text = " ".join(str(error).split())[:200]
        figures["error"] = "out of memory" if "out of memory" in text.lower() else f"{type(error).__name__}: {text}"
    results.put(figures)


class Waiting:
    """A row's process. It imports its libraries while the row before it is measured."""

    def __init__(self, context: Any, row: dict[str, Any], arguments: argparse.Namespace) -> None:
        self.queue, self.turn = context.Queue(), context.Event()
        self.process = context.Process(target=measure, args=(row, arguments, self.queue, self.turn), daemon=True)

    def start(self) -> None:
        """Start the process unless it runs already."""
        if self.process.pid is None:
            self.process.start()

    def begin(self) -> None:
        """Let it measure."""
        self.start()
        self.turn.set()

    def result(self) -> dict[str, Any]:
        """The row's figures; waits for the end of its process."""
        figures: dict[str, Any] = self.queue.get()
        self.process.join()
        return figures


def main() -> None:
    """Measure every row, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", default="", help="only rows with one of these texts in their names, separated by |")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("memory.json"))
    arguments = parser.parse_args()

    import torch
    from transformers import LlamaConfig

    from galore_trainer.run.memory.estimate import estimate_one
    from galore_trainer.run.results.artifacts import environment

    arguments.folder = str(arguments.output.with_suffix(".model"))
    LlamaConfig(**SHAPES[arguments.shape]).save_pretrained(arguments.folder)
    context = multiprocessing.get_context("spawn")
    wanted = arguments.rows.split("|")
    chosen = [(name, row) for name, row in ROWS if any(text in name for text in wanted)]
    waiting = [Waiting(context, row, arguments) for _, row in chosen]
    rows = []
    for i, (name, row) in enumerate(chosen):
        waiting[i].begin()
        if i + 1 < len(waiting):
            waiting[i + 1].start()
        # The estimate runs here while the row's process measures.
        predicted = estimate_one(settings_of(row, arguments), row["method"], arguments.rank).peak
        figures = waiting[i].result()
        rows.append({"name": name, **row, **figures, "predicted": predicted})
        peak = figures["peak"]
        ratio = f"{predicted / peak:6.3f}" if peak and predicted else "     -"
        shown = f"{peak / GIB:7.2f}" if peak else f"{figures['error'] or '-':>7}"
        state = sum(figures.get("state", {}).values()) / GIB
        print(
            f"{name:<56}{shown}  predicted {(predicted or 0) / GIB:6.2f} ({ratio})  state {state:6.2f}",
            flush=True,
        )
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    content = {**vars(arguments), "output": None, "folder": None, "device": device, "environment": environment()}
    arguments.output.write_text(json.dumps({**content, "rows": rows}, indent=1, default=str))


if __name__ == "__main__":
    main()
