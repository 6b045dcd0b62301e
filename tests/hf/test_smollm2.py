"""A real pretrained model's first layers, a few steps by every way into a Trainer: equal losses where they must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from galore_trainer import GaLoreCallback, GaLoreConfig, build_optimizer, galore_plugin
from galore_trainer.recipes import DataConfig, load_data
from galore_trainer.run.models.prompts import encode_all, make_collator

STEPS, LAYERS = 3, 2
CONFIG = GaLoreConfig(rank=16, update_proj_gap=2, residual_warmup_steps=1)


def losses(way: str, folder: Path, output: Path) -> list[float]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=LAYERS)
    rows = encode_all(tokenizer, load_data(DataConfig(train_samples=2 * STEPS, eval_samples=1)).train, 256).rows
    settings: dict[str, Any] = dict(
        output_dir=str(output),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        weight_decay=0.01,
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )
    if way == "sft":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        args: Any = SFTConfig(**settings, bf16=False, gradient_checkpointing=False, max_length=256)
        data: Any = Dataset.from_list(rows)
        trainer: Any = SFTTrainer(
            model, args, train_dataset=data, processing_class=tokenizer, **galore_plugin(CONFIG, args)
        )
    else:
        args = TrainingArguments(**settings)
        if way == "plugin":
            way_in = galore_plugin(CONFIG, args)
        else:
            optimizer = build_optimizer(model, CONFIG, lr=1e-4, weight_decay=0.01, seed=1)
            way_in = {"optimizers": (optimizer, None), "callbacks": [GaLoreCallback()]}
        trainer = Trainer(model, args, train_dataset=rows, data_collator=make_collator(tokenizer), **way_in)  # type: ignore[arg-type]
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.slow
def test_every_way_in_trains_smollm2_with_equal_losses(embedded_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl extra not installed")
    results = {way: losses(way, embedded_model_dir, tmp_path / way) for way in ("plugin", "optimizers", "sft")}
    assert results["plugin"] == results["optimizers"]
    assert len(results["plugin"]) == STEPS
    # TRL pads and masks by itself; the second loss has gone through one update, the third through a refresh
    torch.testing.assert_close(torch.tensor(results["sft"]), torch.tensor(results["plugin"]), rtol=0, atol=2e-3)
