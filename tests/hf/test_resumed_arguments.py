"""What a resume says of arguments that the checkpoint overrules, and a training's end of weights that never moved."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from galore_trainer import GaLoreCallback, build_optimizer, galore_plugin
from galore_trainer.hf.callback import unwrap_optimizer
from tiny_training import CONFIG, arguments, rows

BASE: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "warmup_steps": 2, "weight_decay": 0.1}


def saved(model: Any, folder: Path, **more: Any) -> Callable[..., Trainer]:
    """Train three steps; a function that trains again from the second step's checkpoint."""
    settings = {**BASE, **more}

    def train(resume: str | None = None, plain_lr_ratio: float = CONFIG.plain_lr_ratio, **changes: Any) -> Trainer:
        config = dataclasses.replace(CONFIG, plain_lr_ratio=plain_lr_ratio)
        args = arguments(folder, **{**settings, **changes})
        trainer = Trainer(
            copy.deepcopy(model), args, train_dataset=rows(), eval_dataset=rows(2), **galore_plugin(config, args)
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    train()
    return lambda **changes: train(str(folder / "checkpoint-2"), **changes)


def weights(trainer: Trainer) -> list[nn.Parameter]:
    return list(trainer.model.parameters())  # type: ignore[union-attr]


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in log.records if r.getMessage().startswith("the checkpoint's settings go on")]


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "learning rate": ({"learning_rate": 0.01}, "learning_rate 0.002 (now asked for: 0.01)"),
    "decay": ({"weight_decay": 0.3}, "weight_decay 0.1 (now asked for: 0.3)"),
    "betas": (
        {"adam_beta1": 0.8, "adam_beta2": 0.95},
        "adam_beta1 0.9 (now asked for: 0.8), adam_beta2 0.999 (now asked for: 0.95)",
    ),
    "eps": ({"adam_epsilon": 1e-6}, "adam_epsilon 1e-08 (now asked for: 1e-06)"),
    "ratio": ({"plain_lr_ratio": 0.3}, "galore.plain_lr_ratio 0.25 (now asked for: 0.3)"),
    "two": (
        {"learning_rate": 0.01, "plain_lr_ratio": 0.3},
        "learning_rate 0.002 (now asked for: 0.01), galore.plain_lr_ratio 0.25 (now asked for: 0.3)",
    ),
}


def test_arguments_that_the_checkpoint_overrules_are_named_once(
    tiny_llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resume = saved(tiny_llama, tmp_path)
    ordinary = resume()
    assert warnings_of(caplog) == []
    for changes, said in CHANGES.values():
        caplog.clear()
        trainer = resume(**changes)
        (told,) = warnings_of(caplog)
        assert told.startswith(f"the checkpoint's settings go on: {said}; begin a new run from its weights")
        # what wins is what torch's load_state_dict makes win
        assert all(torch.equal(a, b) for a, b in zip(weights(trainer), weights(ordinary), strict=True))
    caplog.clear()
    trainer.train()  # again, without a resume
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("schedule", ["cosine", "constant", "reduce_lr_on_plateau", "one cycle"])
def test_an_ordinary_resume_under_a_schedule_says_nothing(
    schedule: str, tiny_llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if schedule != "one cycle":
        plateau = {"eval_strategy": "steps", "eval_steps": 1} if schedule == "reduce_lr_on_plateau" else {}
        resume = saved(tiny_llama, tmp_path, lr_scheduler_type=schedule, **plateau)
        resume(max_steps=4)
        assert warnings_of(caplog) == []
        return
    for lr, beta in ((2e-3, 0.999), (2e-3, 0.95)):
        caplog.clear()
        optimizer = build_optimizer(tiny_llama, CONFIG, lr=lr, betas=(0.9, beta))
        cycle: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=5)
        resume_from = None if beta == 0.999 else str(tmp_path / "checkpoint-2")
        Trainer(
            tiny_llama,
            arguments(tmp_path, **BASE),
            train_dataset=rows(),
            optimizers=(optimizer, cycle),
            callbacks=[GaLoreCallback()],
        ).train(resume_from_checkpoint=resume_from)
        told = warnings_of(caplog)
        assert len(told) == (beta != 0.999)
    assert "adam_beta2 0.999 (now asked for: 0.95); begin" in told[0]


def test_groups_with_learning_rates_of_their_own_resume_without_a_word(
    tiny_llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for resume in (None, str(tmp_path / "checkpoint-2")):
        optimizer = build_optimizer(tiny_llama, CONFIG, lr=2e-3)
        for i, group in enumerate(optimizer.param_groups):
            group["lr"], group["weight_decay"] = 1e-3 * (i + 1), 0.01 * i
        args = arguments(tmp_path, **BASE)
        Trainer(
            tiny_llama, args, train_dataset=rows(), optimizers=(optimizer, None), callbacks=[GaLoreCallback()]
        ).train(resume_from_checkpoint=resume)
    assert warnings_of(caplog) == []


def test_weights_without_any_gradient_are_named_at_the_end(
    tiny_llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Part(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return model.model.embed_tokens(inputs["input_ids"]).square().mean()  # type: ignore[union-attr, operator]

    with caplog.at_level(logging.WARNING):
        for kind in (Part, Trainer):
            caplog.clear()
            args = arguments(tmp_path)
            trainer = kind(copy.deepcopy(tiny_llama), args, train_dataset=rows(), **galore_plugin(CONFIG, args))
            trainer.train()
            told = [r.getMessage() for r in caplog.records if "no gradient in any step" in r.getMessage()]
            if kind is Trainer:
                assert told == []
                continue
            unused = sum(not unwrap_optimizer(trainer.optimizer).state[p] for p in weights(trainer))
            (only,) = told
            assert only.startswith("these weights had no gradient in any step, and stay as they were: model.layers.0.")
            assert only.endswith(f"and {unused - 5} more")


def test_a_seq2seq_trainer_takes_the_optimizer(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=1, vocab_size=256, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**sizes))  # type: ignore[arg-type]
    args = Seq2SeqTrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    optimizer = build_optimizer(model, CONFIG, lr=2e-3)
    before = [p.detach().clone() for _, p in optimizer.projected_weights()]
    trainer = Seq2SeqTrainer(
        model, args, train_dataset=rows(), optimizers=(optimizer, None), callbacks=[GaLoreCallback()]
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert not any(torch.equal(a, b) for a, (_, b) in zip(before, optimizer.projected_weights(), strict=True))
