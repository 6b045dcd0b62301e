"""A short training of the tiny Llama by the Trainer, on a CPU: its rows and its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from galore_trainer import GaLoreConfig

CONFIG = GaLoreConfig(rank=4, update_proj_gap=2)


def rows(count: int = 16) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 250, (count, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 8, "labels": row} for row in ids]


def arguments(folder: Path, cls: type = TrainingArguments, **more: Any) -> Any:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=2e-3,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        seed=3,
    )
    return cls(**{**settings, **more})
