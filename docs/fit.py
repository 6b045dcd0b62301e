"""Predicts the peak memory of four settings on four sizes of model; ``python docs/fit.py`` writes results/fit.

Nothing is downloaded: the shapes are those of published models, and ``galore-ft estimate`` needs no weights.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PREDICTED = ROOT / "results" / "fit" / "predicted.json"
LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, Any]] = {
    "1B": {  # Llama-3.2-1B
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "head_dim": 64, "tie_word_embeddings": True,
    },
    "3B": {  # Llama-3.2-3B
        **LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "head_dim": 128, "tie_word_embeddings": True,
    },
    "8B": {  # Llama-3.1-8B
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "head_dim": 128, "tie_word_embeddings": False,
    },
    "14B": {  # Qwen3-14B
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 17408,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "tie_word_embeddings": False,
    },
}  # fmt: skip
SETTINGS = {
    "A": "dtype=float32",
    "B": "dtype=bfloat16",
    "C": "dtype=bfloat16 --layerwise galore.plain_state_bits=8",
    "D": "dtype=bfloat16 --layerwise galore.embeddings=frozen",
}
"""From the most memory to the least, as words after ``galore-ft train sft``."""
COMMON = ("galore.rank=64", "galore.residual_percent=0", "max_length=1024", "bf16=true")
ROWS = {"SFT": 1, "DPO": 2}
"""Sequences of 1024 tokens in a micro-batch: DPO has a chosen and a rejected one."""
CARDS = (16, 24, 48, 80)
"""GiB. A run may have 10^9 bytes of each: 7 % are left to the CUDA context and to what the allocator cannot use."""


def predict(model: str, setting: str, task: str) -> int:
    """Peak bytes of a training step.

    ``estimate`` knows one model. DPO is its count with two sequences, and the weights of a reference model of the same
    type besides: those are frozen, and the logits of their forward pass are gone before the policy's begins.
    """
    from galore_trainer.run.memory.estimate import estimate_run
    from galore_trainer.run.settings.run_config import load_run_config

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODELS[model]))
        words = SETTINGS[setting].replace("--layerwise", "galore.layerwise=true").split()
        shape = [f"model_name_or_path={folder}", *COMMON, f"per_device_train_batch_size={ROWS[task]}"]
        memory = estimate_run(load_run_config("sft", [*shape, *words]))
    assert memory.peak is not None, memory.note
    return memory.peak + (memory.weights if task == "DPO" else 0)


def cases() -> Iterator[tuple[str, str, str]]:
    """Every model, task and setting."""
    for model in MODELS:
        for task in ROWS:
            for setting in SETTINGS:
                yield model, task, setting


def fits(peak: int, card: int) -> bool:
    """Whether a run with this peak has room on a card of so many GiB."""
    return peak <= card * 10**9


def predicted() -> list[dict[str, Any]]:
    """The rows of results/fit/predicted.json."""
    rows: list[dict[str, Any]] = json.loads(PREDICTED.read_text(encoding="utf-8"))
    return rows


def main() -> None:
    """Count every case; some minutes."""
    rows = []
    for model, task, setting in cases():
        rows.append({"model": model, "task": task, "setting": setting, "peak": predict(model, setting, task)})
        print(rows[-1], flush=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    PREDICTED.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
