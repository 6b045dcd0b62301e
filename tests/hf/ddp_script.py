"""Trains the tiny model with the plugin and saves its weights: under torchrun (see test_ddp.py)."""

from __future__ import annotations

import os
import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from galore_trainer import GaLoreConfig, galore_plugin

model_dir, output = sys.argv[1:]
world = int(os.environ["WORLD_SIZE"])
generator = torch.Generator().manual_seed(0)
ids = torch.randint(3, 250, (24, 12), generator=generator).tolist()
rows = [{"input_ids": row, "attention_mask": [1] * 12, "labels": row} for row in ids]
args = TrainingArguments(
    output,
    max_steps=5,
    per_device_train_batch_size=4 // world,
    learning_rate=2e-3,
    weight_decay=0.1,
    use_cpu=True,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    seed=3,
)
config = GaLoreConfig(rank=4, update_proj_gap=2, residual_percent=5.0, residual_warmup_steps=2)
model = AutoModelForCausalLM.from_pretrained(model_dir)
Trainer(model, args, train_dataset=rows, **galore_plugin(config, args)).train()
torch.save(model.state_dict(), f"{output}/weights-{os.environ['RANK']}-of-{world}.pt")
