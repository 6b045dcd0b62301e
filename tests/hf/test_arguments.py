"""``galore_plugin`` reads TrainingArguments when the optimizer is made: searches and late changes count."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers import trainer as trainer_module
from transformers.integrations import integration_utils
from transformers.trainer_utils import BestRun, HPSearchBackend

from galore_trainer import GaLoreCallback, OptionError, galore_plugin
from galore_trainer.hf.callback import unwrap_optimizer
from tiny_training import CONFIG, arguments, rows

CHANGED: dict[str, Any] = {
    "learning_rate": 7e-3,
    "weight_decay": 0.3,
    "adam_beta1": 0.7,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-4,
    "seed": 11,
}


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]  # type: ignore[union-attr]


def test_what_changes_before_training_is_what_trains(tiny_llama: Any, tmp_path: Path) -> None:
    """Equal, to the bit, to a Trainer whose arguments said so from the beginning."""
    models = [copy.deepcopy(tiny_llama) for _ in range(2)]
    late = arguments(tmp_path)
    changed = Trainer(models[0], late, train_dataset=rows(), **galore_plugin(CONFIG, late))
    for name, value in CHANGED.items():
        setattr(changed.args, name, value)
    early = arguments(tmp_path, **CHANGED)
    wanted = Trainer(models[1], early, train_dataset=rows(), **galore_plugin(CONFIG, early))
    for trainer in (changed, wanted):
        trainer.train()
    optimizer = unwrap_optimizer(changed.optimizer)
    assert optimizer.defaults["betas"] == (0.7, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(weights(changed), weights(wanted), strict=True))


class Search:
    """A search over given trials, as a backend of ``hyperparameter_search``."""

    def ensure_available(self) -> None:
        pass

    def run(self, trainer: Trainer, n_trials: int, direction: str, trials: list[dict[str, Any]]) -> BestRun:
        found = []
        for trial in trials:
            trainer.train(trial=trial)  # type: ignore[arg-type]
            found.append((trainer.evaluate()["eval_loss"], trial))
        best = min(found, key=lambda pair: pair[0])
        return BestRun("0", best[0], best[1], found)


def test_every_trial_of_a_search_trains_by_its_own_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setitem(trainer_module.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.WANDB, Search)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(id="0")))  # names folders

    def model() -> Any:
        sizes = dict(hidden_size=32, num_attention_heads=2, intermediate_size=48, num_hidden_layers=1, vocab_size=256)
        return LlamaForCausalLM(LlamaConfig(**sizes))  # type: ignore[arg-type]

    made: list[tuple[float, float, int]] = []

    class Note(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            inner = unwrap_optimizer(optimizer)
            made.append((inner.param_groups[0]["lr"], inner.param_groups[0]["weight_decay"], inner.seed))

    args = arguments(tmp_path)
    plugin = galore_plugin(CONFIG, args)
    plugin["callbacks"].append(Note())
    trainer = Trainer(args=args, model_init=model, train_dataset=rows(), eval_dataset=rows(4), **plugin)
    trials = [{"learning_rate": rate, "weight_decay": 0.1 * i, "seed": i} for i, rate in enumerate((1e-4, 1e-2))]
    best = trainer.hyperparameter_search(backend="wandb", hp_space=lambda trial: trial, n_trials=2, trials=trials)
    assert made == [(1e-4, 0.0, 0), (1e-2, 0.1, 1)]
    assert best.run_summary[0][0] != best.run_summary[1][0]


def test_a_copy_of_the_arguments_in_the_trainer_is_the_one_that_counts(tiny_llama: Any, tmp_path: Path) -> None:
    """Trainers of TRL make a config of their own out of TrainingArguments; changes go to that one."""
    args = arguments(tmp_path)
    plugin = galore_plugin(CONFIG, args)
    trainer = Trainer(tiny_llama, dataclasses.replace(args), train_dataset=rows(), **plugin)
    trainer.args.learning_rate = 5e-3
    trainer.train()
    assert unwrap_optimizer(trainer.optimizer).defaults["lr"] == 5e-3


def test_what_the_kept_optimizer_cannot_follow_is_refused(tiny_llama: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    trainer = Trainer(tiny_llama, args, train_dataset=rows(), **galore_plugin(CONFIG, args))
    trainer.train()
    args.adam_beta2 = 0.5
    with pytest.raises(OptionError, match=r"adam_beta1 and adam_beta2.*0\.5.*wanted \(0\.9, 0\.999\).*new Trainer"):
        trainer.train()


def test_what_is_asked_for_late_is_refused_late(tiny_llama: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, layerwise=True, stagger_refresh=True, first_basis="sketch")
    for change, option in (({"fp16": True}, "galore.layerwise"), ({"optim": "sgd"}, "optim")):
        args = arguments(tmp_path)
        trainer = Trainer(tiny_llama, args, train_dataset=rows(), **galore_plugin(config, args))
        for name, value in change.items():
            setattr(args, name, value)
        with pytest.raises(OptionError) as refused:
            trainer.train()
        assert refused.value.option == option


def test_another_optimizer_beside_the_plugin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"optim: got 'adamw_8bit'.*leave optim out"):
        galore_plugin(CONFIG, arguments(tmp_path, optim="adamw_8bit"))
    galore_plugin(CONFIG, arguments(tmp_path, optim="adamw_torch"))


def test_a_copied_callback_knows_no_training(tiny_llama: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    plugin = galore_plugin(CONFIG, args)
    Trainer(tiny_llama, args, train_dataset=rows(), **plugin).train()
    for again in (pickle.loads(pickle.dumps(plugin)), copy.deepcopy(plugin)):
        fresh = again["callbacks"][0]
        assert isinstance(fresh, GaLoreCallback)
        assert fresh._plugin is again["optimizer_cls_and_kwargs"][1]  # a search on other processes changes both
        assert (fresh._optimizer, fresh._steps_with_lr) == (None, 0)
