"""Layer-wise mode inside the Trainer: accumulation, clipping, checkpoints and the numbers in the log."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from galore_trainer import GaLoreConfig, OptionError, galore_plugin

METHOD: dict[str, Any] = {"rank": 4, "update_proj_gap": 3, "residual_warmup_steps": 2, "residual_percent": 5.0}
LAYERWISE = GaLoreConfig(**METHOD, layerwise=True)
ORDINARY = GaLoreConfig(**METHOD, stagger_refresh=True, first_basis="sketch")


def rows(count: int = 48) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 250, (count, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 12, "labels": [-100] * 5 + row[5:]} for row in ids]


def run(model: Any, config: GaLoreConfig, folder: Any, resume: str | None = None, **more: Any) -> Trainer:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        weight_decay=0.1,
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=3,
        max_grad_norm=0.5,
        lr_scheduler_type="linear",
        warmup_steps=2,
    )
    args = TrainingArguments(**{**settings, **more})
    trainer = Trainer(model, args, train_dataset=rows(), **galore_plugin(config, args))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Trainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def distance(one: Any, other: Any) -> float:
    return max((p - q).abs().max().item() for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_the_trainer_sees_what_it_sees_of_the_ordinary_run(tiny_llama: Any, tmp_path: Any) -> None:
    one, other = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    layerwise, ordinary = run(one, LAYERWISE, tmp_path / "a"), run(other, ORDINARY, tmp_path / "b")
    # Clipping scales before the projection in one run and after it in the other: single entries of the residual that
    # are almost zero feel that rounding through Adam's division. Weights move by about 0.1.
    assert distance(one, other) < 3e-4
    assert max((p - q).abs().mean().item() for p, q in zip(one.parameters(), other.parameters(), strict=True)) < 1e-6
    for key in ("loss", "grad_norm", "learning_rate"):
        assert logged(layerwise, key) == pytest.approx(logged(ordinary, key), rel=1e-4)
    assert min(logged(layerwise, "grad_norm")) > 0.5  # every step was clipped


def test_micro_batches_add_up(tiny_llama: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    one, other = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_grad_norm": 0.0}
    with caplog.at_level(logging.WARNING):
        layerwise = run(one, LAYERWISE, tmp_path / "a", **split)
    assert "unbiased estimate" in caplog.text
    ordinary = run(other, ORDINARY, tmp_path / "b", max_grad_norm=0.0)
    # Sums over micro-batches are rounded otherwise, which single entries of the residual feel as above.
    assert distance(one, other) < 1e-4
    assert max((p - q).abs().mean().item() for p, q in zip(one.parameters(), other.parameters(), strict=True)) < 1e-7
    norms = logged(layerwise, "grad_norm")
    assert norms == pytest.approx(logged(ordinary, "grad_norm"), rel=0.25)
    assert min(norms) > 0.1


@pytest.mark.parametrize("step", [1, 4])
def test_a_killed_run_goes_on_bit_for_bit(step: int, tiny_llama: Any, tmp_path: Any) -> None:
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole, second = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    run(whole, LAYERWISE, tmp_path / "a", save_strategy="steps", save_steps=step, **split)
    resumed = run(second, LAYERWISE, tmp_path / "b", resume=str(tmp_path / "a" / f"checkpoint-{step}"), **split)
    assert resumed.state.global_step == 8
    assert distance(whole, second) == 0.0


def test_gradient_checkpointing_changes_nothing(tiny_llama: Any, tmp_path: Any) -> None:
    one, other = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    run(one, LAYERWISE, tmp_path / "a", gradient_checkpointing=True)
    run(other, LAYERWISE, tmp_path / "b")
    assert distance(one, other) < 1e-5


def test_where_whole_gradients_are_needed_it_is_refused(tmp_path: Any) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    args.fp16 = True
    with pytest.raises(OptionError, match="with fp16"):
        galore_plugin(LAYERWISE, args)
    args.fp16 = False
    args.fsdp = True
    with pytest.raises(OptionError, match=r"galore\.layerwise.*under fsdp.*one process or DDP"):
        galore_plugin(LAYERWISE, args)
