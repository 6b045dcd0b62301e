"""GaLore+ inside the Hugging Face Trainer and TRL's: the same weights by every way in, every argument honoured."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from galore_trainer import GaLoreAdamW, GaLoreCallback, GaLoreConfig, OptionError, build_optimizer, galore_plugin
from galore_trainer.hf.callback import unwrap_optimizer

CONFIG = GaLoreConfig(rank=4, update_proj_gap=2, scale=10.0, plain_lr_ratio=1.0)


def rows(vocabulary: int = 250, count: int = 24) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (count, 12), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 12, "labels": [-100] * 5 + row[5:]} for row in ids]


def arguments(folder: Any, cls: type = TrainingArguments, **more: Any) -> Any:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=3,
    )
    return cls(**{**settings, **more})


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_every_way_in_gives_the_same_losses_and_weights(tiny_llama: Any, tmp_path: Any) -> None:
    """Plugin, optimizers= and a bare loop: the same numbers, so every argument is honoured."""
    models = [copy.deepcopy(tiny_llama) for _ in range(3)]
    args = arguments(tmp_path)
    settings = dict(lr=2e-3, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6, seed=3)
    by_plugin = Trainer(models[0], args, train_dataset=rows(), **galore_plugin(CONFIG, args))
    optimizer = build_optimizer(models[1], CONFIG, **settings)
    by_hand = Trainer(models[1], args, train_dataset=rows(), optimizers=(optimizer, None), callbacks=[GaLoreCallback()])
    expected = losses(by_plugin)
    assert losses(by_hand) == expected

    bare = build_optimizer(models[2], CONFIG, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(bare, lambda step: 1 - step / 5)
    seen = []
    for step, batch in enumerate(by_plugin.get_train_dataloader()):
        if step == 5:
            break
        loss = models[2].train()(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models[2].parameters(), 1.0)
        bare.step()
        schedule.step()
        bare.zero_grad()
        seen.append(loss.item())
    for a, b, c in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=0, atol=1e-5)
    groups = unwrap_optimizer(by_plugin.optimizer).param_groups
    undecayed = {n for g in groups if g["weight_decay"] == 0.0 for n in g["names"]}
    assert undecayed == {n for n, _ in models[0].named_parameters() if "norm" in n}


def test_plain_lr_ratio_sets_the_plain_parameters_apart(tiny_llama: Any, tmp_path: Any) -> None:
    args = arguments(tmp_path, lr_scheduler_type="constant", weight_decay=0.0, max_steps=1)
    config = GaLoreConfig(rank=4, scale=0.0, plain_lr_ratio=0.25)
    trainer = Trainer(tiny_llama, args, train_dataset=rows(), **galore_plugin(config, args))
    before = {n: p.detach().clone() for n, p in tiny_llama.named_parameters()}
    trainer.train()
    moved = {n: (p.detach() - before[n]).abs().max().item() for n, p in tiny_llama.named_parameters()}
    assert moved["model.layers.0.mlp.up_proj.weight"] == 0.0
    assert moved["model.norm.weight"] == pytest.approx(2e-3 * 0.25, rel=1e-2)  # Adam's first step is lr x sign


def test_sft_trainer_takes_the_plugin_and_agrees_with_the_trainer(tiny_model_dir: Any, tmp_path: Any) -> None:
    trl = pytest.importorskip("trl", reason="trl extra not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    data = rows()
    results = []
    for kind in ("trainer", "sft"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        if kind == "trainer":
            args = arguments(tmp_path / kind)
            collator = DataCollatorForSeq2Seq(tokenizer)
            trainer = Trainer(model, args, train_dataset=data, data_collator=collator, **galore_plugin(CONFIG, args))
        else:
            from datasets import Dataset

            args = arguments(tmp_path / kind, trl.SFTConfig, bf16=False, gradient_checkpointing=False)
            split = Dataset.from_list([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in data])
            trainer = trl.SFTTrainer(
                model, args, train_dataset=split, processing_class=tokenizer, **galore_plugin(CONFIG, args)
            )
        results.append(losses(trainer))
        assert "galore/projection_error" in trainer.state.log_history[0]
    assert len(results[0]) == 5
    torch.testing.assert_close(torch.tensor(results[0]), torch.tensor(results[1]), rtol=0, atol=1e-4)


def test_table_and_logs_tell_what_happens(tiny_llama: Any, tmp_path: Any, capsys: Any) -> None:
    tiny_llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    args = arguments(tmp_path)
    trainer = Trainer(tiny_llama, args, train_dataset=rows(), **galore_plugin(CONFIG, args))
    trainer.train()
    out = capsys.readouterr().out
    lines = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert "4, one lends" in lines["2 x model.layers.*.self_attn.q_proj"]
    assert "0.02" in lines["2 x model.layers.*.mlp.gate_proj"].split()  # lr x scale
    assert "frozen" in lines["model.layers.*.mlp.up_proj"]
    assert "100.0%" not in out
    state = sum(unwrap_optimizer(trainer.optimizer).state_bytes().values())
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert all(row["galore/state_bytes"] == state for row in logged)
    assert [row["galore/refresh_seconds"] > 0 for row in logged] == [True, False, True, False, True]
    assert all(row["galore/update_seconds"] > 0 and 0 < row["galore/projection_error"] < 1 for row in logged)


def test_a_weight_that_cannot_move_stops_the_run(tiny_llama: Any, tmp_path: Any) -> None:
    model = tiny_llama.to(torch.bfloat16)
    args = arguments(tmp_path, learning_rate=1e-9, weight_decay=0.0)
    config = GaLoreConfig(rank=4, scale=10.0, stochastic_rounding=False)
    trainer = Trainer(model, args, train_dataset=rows(), **galore_plugin(config, args))
    with pytest.raises(RuntimeError, match=r"did not change in 3 steps.*lr 1e-09|lr .* x scale 10"):
        trainer.train()
    assert trainer.state.global_step <= 3


def test_an_optimizer_that_is_not_ours_is_noticed(tiny_llama: Any, tmp_path: Any) -> None:
    trainer = Trainer(tiny_llama, arguments(tmp_path), train_dataset=rows(), callbacks=[GaLoreCallback()])
    with pytest.raises(OptionError, match="galore_plugin"):
        trainer.train()


@pytest.mark.parametrize("backend", ["DEEPSPEED", "FSDP"])
def test_sharding_backends_refuse_what_they_would_drop_or_cannot_do(
    backend: str, tiny_llama: Any, tmp_path: Any, monkeypatch: Any, caplog: Any
) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{backend}", "true")
    with pytest.raises(OptionError, match="galore_plugin"):
        build_optimizer(tiny_llama, CONFIG)
    refused = {
        "proj_type": "left",
        "state_bits": 8,
        "plain_state_bits": 8,
        "diagnose_refreshes": 1,
        "residual_selection": "global",
        "share_output_heads": True,
        "layerwise": True,
        "first_basis": "sketch",
    }
    for field, value in refused.items():
        with pytest.raises(OptionError, match=rf"galore\.{field}.*under {backend.lower()}"):
            galore_plugin(dataclasses.replace(CONFIG, residual_percent=1.2, **{field: value}), args)
    kwargs = galore_plugin(CONFIG, args)["optimizer_cls_and_kwargs"][1]
    assert kwargs["config"].proj_type == "right"
    assert "proj_type std becomes right" in caplog.text


def test_a_deepspeed_file_with_an_optimizer_of_its_own_is_refused(tmp_path: Any, monkeypatch: Any) -> None:
    args = arguments(tmp_path)
    args.deepspeed = {"optimizer": {"type": "AdamW"}}
    args.hf_deepspeed_config = SimpleNamespace(config=args.deepspeed)
    with pytest.raises(OptionError, match=r"deepspeed\.optimizer.*AdamW.*Remove it"):
        galore_plugin(CONFIG, args)


def test_settings_that_the_plugin_would_ignore_are_refused(tmp_path: Any) -> None:
    args = arguments(tmp_path, optim_args="rank=8")
    with pytest.raises(OptionError, match="GaLoreConfig"):
        galore_plugin(CONFIG, args)


def test_gradient_accumulation_equals_one_large_batch(tiny_llama: Any, tmp_path: Any) -> None:
    models = [copy.deepcopy(tiny_llama) for _ in range(2)]
    for model, size, steps in zip(models, (8, 2), (1, 4), strict=True):
        args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=3)
        Trainer(model, args, train_dataset=rows(), **galore_plugin(CONFIG, args)).train()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # sums of gradients in another order


@pytest.mark.parametrize("way", ["plugin", "optimizers"])
def test_checkpoint_and_resume_are_bit_exact(way: str, tiny_llama: Any, tmp_path: Any) -> None:
    def trainer(model: Any, **more: Any) -> Trainer:
        args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=3, **more)
        if way == "plugin":
            return Trainer(model, args, train_dataset=rows(), **galore_plugin(CONFIG, args))
        return Trainer(model, args, train_dataset=rows(), optimizers=(build_optimizer(model, CONFIG, lr=2e-3), None))

    whole, again = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    trainer(whole).train()
    resumed = trainer(again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert isinstance(unwrap_optimizer(resumed.optimizer), GaLoreAdamW)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
