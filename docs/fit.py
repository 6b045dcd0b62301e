"""Predicts peak memory: of four settings on four sizes of model, and of the packaged configurations that name a card.

``python docs/fit.py`` writes results/fit. Nothing is downloaded: the shapes are those of published models, and
``galore-ft estimate`` needs no weights.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blocks import table

ROOT = Path(__file__).resolve().parents[1]
PREDICTED = ROOT / "results" / "fit" / "predicted.json"
CONFIGURATIONS = ROOT / "results" / "fit" / "configurations.json"
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
SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B-Instruct": MODELS["1B"],
    "meta-llama/Llama-3.2-3B-Instruct": MODELS["3B"],
    "meta-llama/Llama-3.1-8B-Instruct": MODELS["8B"],
    "Qwen/Qwen2.5-1.5B-Instruct": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-14B-Instruct": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-4B-Instruct-2507": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 262144, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""The published shape of each model that a packaged configuration for a card names."""
SETTINGS = {
    "A": "dtype=float32",
    "B": "dtype=bfloat16",
    "C": "dtype=bfloat16 --layerwise galore.plain_state_bits=8",
    "D": "dtype=bfloat16 --layerwise galore.embeddings=frozen",
}
"""From the most memory to the least, as words after ``galore-ft train sft``."""
COMMON = ("galore.rank=64", "galore.residual_percent=0", "max_length=1024")
ROWS = {"SFT": 1, "DPO": 2}
"""Sequences of 1024 tokens in a micro-batch: DPO has a chosen and a rejected one."""
SAVING = ("layerwise", "embeddings", "state_bits", "plain_state_bits")
"""Settings of ``galore`` that a configuration for a small card changes."""
CARDS = (16, 24, 48, 80)
"""GiB. A run may have 10^9 bytes of each: 7 % are left to the CUDA context and to what the allocator cannot use."""


@contextlib.contextmanager
def configure(config: str, shape: Mapping[str, Any], words: Sequence[str]) -> Iterator[Any]:
    """A packaged configuration with ``words``, for a model of this shape whose configuration alone is there."""
    from galore_trainer.run.settings.run_config import load_run_config

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        yield load_run_config(config, [f"model_name_or_path={folder}", "bf16=true", *words])


def predict(model: str, setting: str, task: str) -> int:
    """Peak bytes of a training step; of ``sft``'s scoring where that takes more.

    ``estimate`` knows one model. DPO is its count with two sequences, and the weights of a reference model of the same
    type besides: those are frozen, and the logits of their forward pass are gone before the policy's begins.
    """
    from galore_trainer.run.memory.estimate import estimate_run
    from galore_trainer.run.study.sweep_memory import run_bytes

    words = SETTINGS[setting].replace("--layerwise", "galore.layerwise=true").split()
    with configure("sft", MODELS[model], [*COMMON, f"per_device_train_batch_size={ROWS[task]}", *words]) as config:
        if task == "SFT":
            return run_bytes(config)
        memory = estimate_run(config)
    assert memory.peak is not None, memory.note
    return memory.peak + memory.weights


def cards() -> dict[str, int]:
    """The packaged configurations that name a card, and its GiB: the end of their names."""
    from galore_trainer.run.settings.run_config import packaged_configs

    ends = {name: re.search(r"-(\d+)gb$", name) for name in packaged_configs()}
    return {name: int(end[1]) for name, end in ends.items() if end}


def shaped(name: str, layers: int | None = None) -> contextlib.AbstractContextManager[Any]:
    """A packaged configuration for a card, with all layers of its model or with so many."""
    from galore_trainer.run.settings.run_config import load_run_config

    shape = SHAPES[load_run_config(name).model_name_or_path]
    return configure(name, {**shape, "num_hidden_layers": layers or shape["num_hidden_layers"]}, ())


def predict_configuration(name: str, layers: int | None = None) -> int:
    """Peak bytes of a run of a packaged configuration: of a training step, or of scoring where that takes more."""
    from galore_trainer.run.study.sweep_memory import run_bytes

    with shaped(name, layers) as config:
        return run_bytes(config)


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


def predicted_configurations() -> list[dict[str, Any]]:
    """The rows of results/fit/configurations.json."""
    rows: list[dict[str, Any]] = json.loads(CONFIGURATIONS.read_text(encoding="utf-8"))
    return rows


def configurations_table() -> str:
    """docs/choosing.md: the packaged configurations for cards, by the card's size."""
    from galore_trainer.config import GaLoreConfig
    from galore_trainer.run.settings.run_config import load_run_config

    usual, rows, gigabytes = GaLoreConfig(), [], cards()
    for row in sorted(predicted_configurations(), key=lambda row: (gigabytes[row["configuration"]], row["peak"])):
        config = load_run_config(row["configuration"])
        galore = {name: getattr(config.galore, name) for name in SAVING}
        changed = [f"`{name}: {value}`" for name, value in galore.items() if value != getattr(usual, name)]
        rows.append(
            (
                f"`{row['configuration']}`",
                config.model_name_or_path,
                f"{gigabytes[row['configuration']]} GB",
                ", ".join(changed).replace("True", "true"),
                f"{config.galore.rank}",
                f"{config.training['learning_rate']:.0e}".replace("e-0", "e-"),
                f"{row['peak'] / (1 << 30):.1f}",
            )
        )
    head = ("configuration", "model", "card", "saves memory by", "rank", "learning rate", "predicted peak, GiB")
    return table([head, *rows], numbers=3)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON list with a row a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    """Count every case; some minutes."""
    rows = []
    for model, task, setting in cases():
        rows.append({"model": model, "task": task, "setting": setting, "peak": predict(model, setting, task)})
        print(rows[-1], flush=True)
    write(PREDICTED, rows)
    write_configurations()


def write_configurations() -> None:
    """Count the packaged configurations that name a card."""
    rows = []
    for name in cards():
        rows.append({"configuration": name, "peak": predict_configuration(name)})
        print(rows[-1], flush=True)
    write(CONFIGURATIONS, rows)


if __name__ == "__main__":
    main()
