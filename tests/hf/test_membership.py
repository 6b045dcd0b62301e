"""The optimizer holds what the model trains, at the start and later; what it does not hold is named, not left alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from galore_trainer import GaLoreCallback, GaLoreConfig, OptionError, build_optimizer, galore_plugin
from galore_trainer.hf.backend import check_averaged
from galore_trainer.hf.membership import Membership
from tiny_training import CONFIG, arguments, rows

HEAD = "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def untied(tiny_llama: Any) -> Any:
    """The tiny Llama with an output layer of its own."""
    tiny_llama.config.tie_word_embeddings = False
    tiny_llama.lm_head.weight = nn.Parameter(tiny_llama.lm_head.weight.detach().clone())
    return tiny_llama


def train(model: Any, optimizer: Any, folder: Path, *more: Any) -> Trainer:
    callbacks = [GaLoreCallback(print_table=False), *more]
    args = arguments(folder, max_steps=4)
    trainer = Trainer(model, args, train_dataset=rows(), optimizers=(optimizer, None), callbacks=callbacks)
    trainer.train()
    return trainer


def adapters(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft extra not installed")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def replaced_head(model: Any) -> Any:
    model.lm_head = nn.Linear(64, 256, bias=False)
    return model


def assigned(model: Any) -> Any:
    model.load_state_dict({n: p.clone() for n, p in model.state_dict().items()}, assign=True)
    return model


CHANGES: dict[str, tuple[Callable[[Any], Any], str, str | None]] = {
    "another model": (copy.deepcopy, "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"),
    "adapters": (adapters, "q_proj.lora_A.default.weight", None),
    "new head": (replaced_head, HEAD, HEAD),
    "assigned": (assigned, "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_optimizer_built_before_a_change_of_the_model_is_refused(change: str, untied: Any, tmp_path: Path) -> None:
    make, loose, foreign = CHANGES[change]
    optimizer = build_optimizer(untied, CONFIG, lr=2e-3)
    model = make(untied)
    with pytest.raises(OptionError, match=r"a model that trains .* without it") as refused:
        train(model, optimizer, tmp_path)
    before, _, after = refused.value.got.partition("weights that the model does not have: ")
    assert loose in before
    assert (foreign is None) == (after == "")
    assert foreign is None or foreign in after
    assert "galore_plugin" in refused.value.way_out


class Change(TrainerCallback):
    """Changes the model after the second step."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        self.change = change

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.change(model)


def unfreeze(model: Any) -> None:
    model.get_parameter(UP).requires_grad_(True)


@pytest.mark.parametrize(("change", "name"), [(unfreeze, UP), (replaced_head, HEAD), (assigned, "0.self_attn.q_proj")])
def test_a_later_change_is_refused_before_the_next_step(change: Any, name: str, untied: Any, tmp_path: Path) -> None:
    untied.get_parameter(UP).requires_grad_(False)
    untied.get_input_embeddings().weight.requires_grad_(False)
    optimizer = build_optimizer(untied, CONFIG, lr=2e-3)
    before = {n: p.detach().clone() for n, p in untied.named_parameters()}
    reached: list[int] = []

    class Reached(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reached.append(state.global_step)

    with pytest.raises(OptionError) as refused:
        train(untied, optimizer, tmp_path, Reached(), Change(change))
    assert name in refused.value.got
    assert reached == [1, 2]
    if change is unfreeze:
        assert torch.equal(before[UP], untied.get_parameter(UP))
        assert "requires_grad_(False)" in refused.value.way_out


def test_what_may_change_may_change(untied: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Data under the same parameter, frozen weights that become so, and weights that are held and unfrozen again."""
    optimizer = build_optimizer(untied, CONFIG, lr=2e-3)
    untied.get_parameter(UP).requires_grad_(False)

    def change(model: Any) -> None:
        unfreeze(model)
        head = model.lm_head.weight
        head.data = head.data.clone()
        model.model.norm.weight.requires_grad_(False)

    frozen = untied.get_parameter(UP).detach().clone()
    with caplog.at_level(logging.WARNING):
        trainer = train(untied, optimizer, tmp_path, Change(change))
    assert trainer.state.global_step == 4
    assert f"the optimizer holds frozen weights, which stay as they are: {UP}" in caplog.text
    assert not torch.equal(frozen, untied.get_parameter(UP))  # it is trained from the third step on


def test_training_twice_by_the_plugin_and_with_adapters(tiny_llama: Any, tmp_path: Path) -> None:
    model = adapters(tiny_llama)
    args = arguments(tmp_path, max_steps=2, gradient_checkpointing=True, logging_steps=1)
    plugin = galore_plugin(GaLoreConfig(rank=2, target_modules=["lora_A.default", "lora_B.default"]), args)
    trainer = Trainer(model, args, train_dataset=rows(), eval_dataset=rows(4), **plugin)
    trainer.evaluate()
    for _ in range(2):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_resume_and_the_best_model_change_no_membership(tiny_llama: Any, tmp_path: Path) -> None:
    more: dict[str, Any] = dict(save_strategy="steps", eval_strategy="steps", save_steps=1, eval_steps=1)
    for resume in (None, str(tmp_path / "checkpoint-1")):
        args = arguments(tmp_path, load_best_model_at_end=True, **more)
        optimizers, callbacks = (build_optimizer(tiny_llama, CONFIG, lr=2e-3), None), [GaLoreCallback()]
        trainer = Trainer(
            tiny_llama, args, train_dataset=rows(), eval_dataset=rows(4), optimizers=optimizers, callbacks=callbacks
        )
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 3


def test_processes_that_accelerate_leaves_apart_are_refused(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_averaged(tiny_llama, SimpleNamespace(world_size=2))
    tiny_llama._is_accelerate_prepared = True  # as an evaluation before training leaves it
    check_averaged(tiny_llama, SimpleNamespace(world_size=1))
    check_averaged(tiny_llama, SimpleNamespace(world_size=2, fsdp=True))
    with pytest.raises(OptionError, match=r"before train.*on 2 processes.*eval_on_start=True"):
        check_averaged(tiny_llama, SimpleNamespace(world_size=2))


def test_an_adapter_config_of_the_trainer_is_seen(tiny_model_dir: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl extra not installed")
    peft = pytest.importorskip("peft", reason="peft extra not installed")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    args = trl.SFTConfig(**{**arguments(tmp_path).to_dict(), "bf16": False, "gradient_checkpointing": False})
    trainer = trl.SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows()]),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        callbacks=[GaLoreCallback()],
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        optimizers=(build_optimizer(model, CONFIG), None),
    )
    with pytest.raises(OptionError, match=r"lora_A.*get_peft_model"):
        trainer.train()


def test_a_compiled_and_a_tied_model_hold_the_same_weights(tiny_llama: Any) -> None:
    membership = Membership(torch.compile(tiny_llama), build_optimizer(tiny_llama, CONFIG), "single")  # type: ignore[arg-type]
    membership.check()
    membership.check()


def test_without_the_callback_steps_that_move_nothing_are_refused(untied: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(untied)
    optimizer = build_optimizer(untied, CONFIG, lr=2e-3)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, None))
    with pytest.raises(OptionError, match="2 steps in which none of its weights had a gradient"):
        trainer.train()


def test_without_the_callback_weights_beside_the_optimizer_are_named_once(
    untied: Any, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = build_optimizer(untied, CONFIG, lr=2e-3)
    replaced_head(untied)
    with caplog.at_level(logging.WARNING):
        for row in rows(2):
            batch = {key: torch.tensor([value]) for key, value in row.items()}
            optimizer.zero_grad()
            optimizer.step(lambda batch=batch: untied(**batch).loss.backward())
    assert [record.getMessage() for record in caplog.records].count(
        f"these weights have gradients and are not in the optimizer, which was built before them: {HEAD}"
    ) == 1
