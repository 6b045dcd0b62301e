"""Clipping inside the step in a Trainer: the weights and norms of the Trainer's clipping, without its passes."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from galore_trainer import GaLoreCallback, GaLoreConfig, OptionError, attach, build_optimizer, galore_plugin
from galore_trainer.hf.backend import fitted_config
from galore_trainer.run.settings.arguments import check_method, training_arguments
from galore_trainer.run.settings.run_config import load_run_config

LIMIT = 0.5
SETTINGS: dict[str, Any] = {"rank": 4, "update_proj_gap": 3, "residual_warmup_steps": 2}


def rows(count: int = 48) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 250, (count, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 12, "labels": row} for row in ids]


def arguments(folder: Any, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        adam_epsilon=1e-6,
        logging_steps=2,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=3,
    )
    return TrainingArguments(**{**settings, **more})


def logged(trainer: Trainer, key: str) -> list[float]:
    trainer.train()
    return [row[key] for row in trainer.state.log_history if key in row]


@pytest.mark.parametrize("way", ["plugin", "optimizers", "attach"])
def test_it_is_the_trainer_s_clipping(way: str, tiny_llama: Any, tmp_path: Any, monkeypatch: Any) -> None:
    one, other = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    args = arguments(tmp_path, max_grad_norm=LIMIT)
    by_trainer = Trainer(other, args, train_dataset=rows(), **galore_plugin(GaLoreConfig(**SETTINGS), args))
    expected = logged(by_trainer, "grad_norm")
    assert len(expected) == 3
    assert min(expected) > LIMIT  # every step was clipped

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the Trainer measures gradients")

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", refuse)
    args = arguments(tmp_path, max_grad_norm=0.0)
    config = GaLoreConfig(**SETTINGS, max_grad_norm=LIMIT)
    if way == "plugin":
        trainer = Trainer(one, args, train_dataset=rows(), **galore_plugin(config, args))
    elif way == "attach":
        trainer = attach(Trainer(one, args, train_dataset=rows()), config)
    else:
        optimizer = build_optimizer(one, GaLoreConfig(**SETTINGS), lr=2e-3, eps=1e-6, seed=3, max_grad_norm=LIMIT)
        trainer = Trainer(one, args, train_dataset=rows(), optimizers=(optimizer, None), callbacks=[GaLoreCallback()])
    assert logged(trainer, "grad_norm") == pytest.approx(expected, rel=1e-4)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)  # weights move by some 0.01


def test_without_it_the_trainer_logs_its_own_norm(tiny_llama: Any, tmp_path: Any) -> None:
    args = arguments(tmp_path, max_grad_norm=0.0, max_steps=2)
    trainer = Trainer(
        copy.deepcopy(tiny_llama), args, train_dataset=rows(), **galore_plugin(GaLoreConfig(**SETTINGS), args)
    )
    assert len(logged(trainer, "grad_norm")) == 1


def test_beside_the_trainer_s_it_is_refused(tiny_llama: Any, tmp_path: Any) -> None:
    config, args = GaLoreConfig(rank=4, max_grad_norm=LIMIT), arguments(tmp_path)  # whose max_grad_norm is 1.0
    with pytest.raises(OptionError, match=r"galore\.max_grad_norm: got '0\.5 beside max_grad_norm 1\.0 of"):
        galore_plugin(config, args)
    with pytest.raises(OptionError, match="Set max_grad_norm: 0"):
        attach(Trainer(tiny_llama, args, train_dataset=rows()), config)
    optimizer = build_optimizer(tiny_llama, config)
    trainer = Trainer(
        tiny_llama, args, train_dataset=rows(), optimizers=(optimizer, None), callbacks=[GaLoreCallback()]
    )
    with pytest.raises(OptionError, match="Set max_grad_norm: 0"):
        trainer.train()


def test_a_run_refuses_it_before_anything_is_loaded() -> None:
    words = ["model_name_or_path=none", "data.source=a.jsonl", "use_cpu=true", "bf16=false", "galore.max_grad_norm=1"]
    config = load_run_config("sft", words)
    with pytest.raises(OptionError, match="Set max_grad_norm: 0"):
        check_method(config, training_arguments(config))
    config = load_run_config("sft", [*words, "max_grad_norm=0"])
    check_method(config, training_arguments(config))
    with pytest.raises(OptionError, match=r"galore\.max_grad_norm"):
        load_run_config("sft", [*words, "max_grad_norm=0", "method=galore_torch"])


@pytest.mark.parametrize("clipping", ["auto", 1.0, 0.0])
def test_under_deepspeed_it_is_refused(clipping: Any) -> None:
    """Which calls the optimizer for one group of weights after the other."""
    settings = {"zero_optimization": {"stage": 2}, "gradient_clipping": clipping}
    args = SimpleNamespace(deepspeed=settings, hf_deepspeed_config=SimpleNamespace(config=settings), max_grad_norm=0.0)
    with pytest.raises(OptionError, match=r"galore\.max_grad_norm: got '1\.0 under DeepSpeed'.*gradient_clipping"):
        fitted_config(GaLoreConfig(max_grad_norm=1.0), args)
