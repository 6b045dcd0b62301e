"""``attach`` lets any Trainer of transformers and TRL train with GaLore+, or says by name why it cannot."""

from __future__ import annotations

import contextlib
import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

from galore_trainer import (
    GaLoreAdamW,
    GaLoreCallback,
    GaLoreConfig,
    OptionError,
    attach,
    build_optimizer,
    galore_plugin,
)
from galore_trainer.hf.callback import unwrap_optimizer
from tiny_training import CONFIG, arguments, rows

WORDS = ["red", "blue", "one", "two", "yes", "no", "up", "down"]
COLUMNS: dict[str, list[Any]] = {
    "text": [f"Say {word}." for word in WORDS],
    "prompt": [f"Say {word}:" for word in WORDS],
    "chosen": [f" {word}" for word in WORDS],
    "rejected": [" never"] * 8,
    "completion": [f" {word}" for word in WORDS],
    "label": [True, False] * 4,
    "reference": [f" {word}!" for word in WORDS],
    "privileged_context": ["Repeat it."] * 8,
    "messages": [
        [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}] for word in WORDS
    ],
}


def rewards(completions: list[Any], **columns: Any) -> list[float]:
    """Reward each completion differently, so that every group has an advantage."""
    return [float(i) for i, _ in enumerate(completions)]


def other_model(tiny_model_dir: Path) -> nn.Module:
    """A teacher that a student can learn from."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


PAIRS = ("prompt", "chosen", "rejected")
SHORT = {"max_completion_length": 4}
GROUPS = {**SHORT, "num_generations": 2}
# module of the trainer and its config, first part of their names, columns of its data, settings, further arguments
TRAINERS: list[tuple[str, str, tuple[str, ...], dict[str, Any], dict[str, Any]]] = [
    ("trl", "SFT", ("text",), {}, {}),
    ("trl", "DPO", PAIRS, {}, {}),
    ("trl", "KTO", ("prompt", "completion", "label"), {}, {}),
    ("trl", "Reward", PAIRS, {}, {}),
    ("trl", "GRPO", ("prompt",), GROUPS, {"reward_funcs": rewards}),
    ("trl", "RLOO", ("prompt",), GROUPS, {"reward_funcs": rewards}),
    ("trl", "Distillation", ("prompt",), SHORT, {"teacher_model": other_model}),
    ("trl.experimental.cpo", "CPO", PAIRS, {"max_length": 32}, {}),
    ("trl.experimental.orpo", "ORPO", PAIRS, {"max_length": 32}, {}),
    ("trl.experimental.online_dpo", "OnlineDPO", ("prompt",), {"max_new_tokens": 4}, {"reward_funcs": rewards}),
    ("trl.experimental.gkd", "GKD", ("messages",), {"max_new_tokens": 4}, {"teacher_model": other_model}),
    ("trl.experimental.tpo", "TPO", (*PAIRS, "reference"), {}, {}),
    ("trl.experimental.gmpo", "GMPO", ("prompt",), GROUPS, {"reward_funcs": rewards}),
    ("trl.experimental.sdft", "SDFT", ("prompt", "privileged_context"), GROUPS, {}),
]
IDS = [name for _, name, *_ in TRAINERS]


@pytest.fixture(autouse=True)
def _without_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def trl_trainer(name: str, model_dir: Path, folder: Path, **settings: Any) -> Any:
    """A trainer of TRL on a CPU, of eight short rows; skips where this version of TRL has none of that name."""
    pytest.importorskip("trl", reason="trl extra not installed")
    from datasets import Dataset
    from transformers import AutoTokenizer

    home, _, columns, of_kind, more = TRAINERS[IDS.index(name)]
    for place in (home, "trl", f"trl.experimental.{name.lower()}"):  # trainers move between versions
        with contextlib.suppress(ImportError, AttributeError):
            module = importlib.import_module(place)
            trainer_class, config_class = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
            break
    else:
        pytest.skip(f"{name}Trainer is not in this version of trl")
    settings = {"bf16": False, "gradient_checkpointing": False, **of_kind, **settings}
    config = arguments(folder, config_class, **settings)
    return trainer_class(
        model=str(model_dir),
        args=config,
        train_dataset=Dataset.from_dict({column: COLUMNS[column] for column in columns}),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        **{key: value(model_dir) if value is other_model else value for key, value in more.items()},
    )


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def unmoved(trainer: Any, before: dict[str, torch.Tensor]) -> list[str]:
    """Names of projected weights that training left as they were."""
    projected = unwrap_optimizer(trainer.optimizer).projected_weights()
    assert len(projected) == 14  # seven in each of two layers
    return [name for name, p in projected if torch.equal(p, before[name])]


def callbacks(trainer: Any) -> list[Any]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, GaLoreCallback)]


@pytest.mark.parametrize("name", IDS)
def test_a_trainer_of_trl_trains_with_galore(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = trl_trainer(name, tiny_model_dir, tmp_path)
    before = weights(trainer)
    assert attach(trainer, CONFIG) is trainer
    trainer.train()
    assert type(trainer.optimizer.optimizer) is GaLoreAdamW
    assert len(callbacks(trainer)) == 1
    assert unmoved(trainer, before) == []
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [0 < row["galore/projection_error"] < 1 for row in logs] == [True] * 3


class Narrow(Trainer):
    """A Trainer whose ``__init__`` knows nothing of optimizers, and whose ``create_optimizer`` asks its parent."""

    def __init__(self, model: nn.Module, args: TrainingArguments, train_dataset: Any) -> None:
        super().__init__(model=model, args=args, train_dataset=train_dataset)

    def create_optimizer(self, model: Any = None) -> Any:
        return super().create_optimizer() if model is None else super().create_optimizer(model)


@pytest.mark.parametrize("cls", [Trainer, Seq2SeqTrainer, Narrow])
@pytest.mark.parametrize("layerwise", [False, True])
def test_attach_equals_the_plugin_bit_for_bit(cls: Any, layerwise: bool, tiny_llama: Any, tmp_path: Path) -> None:
    config = GaLoreConfig(rank=4, update_proj_gap=2, layerwise=layerwise, first_basis="sketch", stagger_refresh=True)
    model = copy.deepcopy(tiny_llama)
    args = arguments(tmp_path, Seq2SeqTrainingArguments, weight_decay=0.1)
    Trainer(model, args, train_dataset=rows(), **galore_plugin(config, args)).train()
    trainer = attach(cls(model=tiny_llama, args=args, train_dataset=rows()), config)
    trainer.train()
    assert unwrap_optimizer(trainer.optimizer).config.layerwise == layerwise
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_llama.parameters(), strict=True))


def test_a_resumed_dpo_run_ends_where_an_uninterrupted_one_does(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = attach(trl_trainer("DPO", tiny_model_dir, tmp_path, **settings), CONFIG)
    whole.train()
    resumed = attach(trl_trainer("DPO", tiny_model_dir, tmp_path / "again", **settings), CONFIG)
    before = weights(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert unmoved(resumed, before) == []
    again = weights(resumed)
    assert all(torch.equal(again[name], w) for name, w in weights(whole).items())


def test_what_changes_after_attach_counts(tiny_llama: Any, tmp_path: Path) -> None:
    """The optimizer is made when training starts: from the arguments and the weights of that moment."""
    trainer = attach(Trainer(tiny_llama, arguments(tmp_path), train_dataset=rows()), CONFIG)
    trainer.args.learning_rate = 5e-3
    tiny_llama.lm_head.weight.requires_grad_(False)  # tied to the embedding
    tiny_llama.model.layers[0].requires_grad_(False)
    trainer.train()
    optimizer = unwrap_optimizer(trainer.optimizer)
    assert optimizer.defaults["lr"] == 5e-3
    assert not [name for name, _ in optimizer.model_weights() if "layers.0." in name or "embed" in name]


# ------------------------------------------------------------------------------------------ refusals


def trained(trainer: Trainer) -> None:
    trainer.args.max_steps = 1
    trainer.train()


def with_adam(trainer: Trainer) -> None:
    trainer.optimizer = torch.optim.Adam(trainer.model.parameters())  # type: ignore[union-attr]


def with_scheduler(trainer: Trainer) -> None:
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.Adam(trainer.model.parameters()))  # type: ignore[union-attr]


def with_class(trainer: Trainer) -> None:
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {})


def with_ours(trainer: Trainer) -> None:
    trainer.optimizer = build_optimizer(trainer.model, CONFIG)  # type: ignore[arg-type]


REFUSED: list[tuple[Any, str, str]] = [
    (trained, "trainer", r"has begun, at step 1.*new Trainer.*before train\(\)"),
    (with_adam, "optimizers", r"an optimizer, Adam.*without optimizers=.*attach brings"),
    (with_ours, "optimizers", "GaLoreAdamW.*without optimizers="),
    (lambda trainer: trainer.create_optimizer(), "optimizers", "do not call create_optimizer"),
    (with_scheduler, "optimizers", "a scheduler, ConstantLR.*lr_scheduler_type"),
    (with_class, "optimizer_cls_and_kwargs", "SGD.*without it"),
    (lambda trainer: attach(trainer, CONFIG), "trainer", "has GaLore\\+ already.*once"),
    (lambda trainer: trainer.add_callback(GaLoreCallback), "trainer", "has GaLore\\+ already.*GaLoreCallback"),
    (lambda trainer: setattr(trainer.args, "optim", "adafactor"), "optim", "adafactor.*leave optim out"),
    (lambda trainer: setattr(trainer.args, "optim_args", "rank=8"), "optim_args", "fields of GaLoreConfig"),
]


@pytest.mark.parametrize(("change", "option", "text"), REFUSED)
def test_a_trainer_that_cannot_take_it_is_refused_and_left_alone(
    change: Any, option: str, text: str, tiny_llama: Any, tmp_path: Path
) -> None:
    trainer = Trainer(tiny_llama, arguments(tmp_path), train_dataset=rows())
    change(trainer)
    before = (trainer.optimizer, trainer.optimizer_cls_and_kwargs, list(trainer.callback_handler.callbacks))
    with pytest.raises(OptionError, match=text) as refused:
        attach(trainer, CONFIG)
    assert refused.value.option == option
    assert before == (trainer.optimizer, trainer.optimizer_cls_and_kwargs, trainer.callback_handler.callbacks)


def test_a_trainer_in_training_is_refused(tiny_llama: Any, tmp_path: Path) -> None:
    class Late(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            attach(trainer, CONFIG)

    trainer = Trainer(tiny_llama, arguments(tmp_path), train_dataset=rows(), callbacks=[Late()])
    with pytest.raises(OptionError, match=r"has begun, at step 0.*before train\(\)"):
        trainer.train()


@pytest.mark.parametrize("other", [None, "trainer", CONFIG, nn.Linear(2, 2), Trainer])
def test_what_is_no_trainer_is_refused(other: Any) -> None:
    with pytest.raises(OptionError, match=r"transformers\.Trainer.*build_optimizer") as refused:
        attach(other, CONFIG)
    assert refused.value.option == "trainer"


@pytest.mark.parametrize("config", [{"rank": 4}, 1e-4, "galore"])
def test_what_is_no_config_is_refused(config: Any, tiny_llama: Any, tmp_path: Path) -> None:
    trainer = Trainer(tiny_llama, arguments(tmp_path), train_dataset=rows())
    with pytest.raises(OptionError, match=r"wanted a GaLoreConfig.*GaLoreConfig\(rank"):
        attach(trainer, config)


def test_adapters_are_refused_unless_they_are_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft not installed")
    from transformers import AutoModelForCausalLM

    adapters = peft.LoraConfig(r=8, target_modules=["q_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), adapters)
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows())
    with pytest.raises(OptionError, match=r"adapters.*without adapters") as refused:
        attach(trainer, CONFIG)
    assert refused.value.option == "model"
    assert callbacks(trainer) == []
    named = GaLoreConfig(rank=4, target_modules=["lora_A.default", "lora_B.default"], head_fallback="joint")
    attach(trainer, named).train()


def test_a_class_that_makes_another_optimizer_is_named_when_training_starts(tiny_llama: Any, tmp_path: Path) -> None:
    class Stubborn(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)  # type: ignore[union-attr]
            return self.optimizer

    trainer = attach(Stubborn(tiny_llama, arguments(tmp_path), train_dataset=rows()), CONFIG)
    with pytest.raises(OptionError, match=r"SGD.*super\(\)\.create_optimizer\(\)") as refused:
        trainer.train()
    assert refused.value.option == "Trainer.create_optimizer"


@pytest.mark.parametrize("backend", ["DEEPSPEED", "FSDP"])
def test_under_sharding_the_way_out_is_attach(
    backend: str, tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny_llama, arguments(tmp_path), train_dataset=rows())
    monkeypatch.setenv(f"ACCELERATE_USE_{backend}", "true")
    with pytest.raises(OptionError, match=r"attach\(trainer, config\)"):
        build_optimizer(tiny_llama, CONFIG)
    with pytest.raises(OptionError, match=rf"galore\.state_bits.*under {backend.lower()}"):
        attach(trainer, GaLoreConfig(rank=4, state_bits=8))
    assert trainer.optimizer_cls_and_kwargs is None
    assert attach(trainer, CONFIG).optimizer_cls_and_kwargs[1]["config"].proj_type == "right"


# ------------------------------------------------------------------------------------------ callbacks of the user


class Note(TrainerCallback):
    """Keeps the keys of every log."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(set(logs))


@pytest.mark.parametrize("way", ["plugin", "attach"])
def test_callbacks_of_the_user_stay_beside_ours(way: str, tiny_llama: Any, tmp_path: Path) -> None:
    note, args = Note(), arguments(tmp_path, max_steps=1)
    if way == "plugin":
        trainer = Trainer(tiny_llama, args, train_dataset=rows(), **galore_plugin(CONFIG, args, callbacks=[note]))
    else:
        trainer = attach(Trainer(tiny_llama, args, train_dataset=rows(), callbacks=[note]), CONFIG)
    trainer.train()
    assert "galore/state_bytes" in note.seen[0]
    assert len(callbacks(trainer)) == 1


@pytest.mark.parametrize("ours", [GaLoreCallback, GaLoreCallback()])
def test_our_callback_among_those_of_the_user_is_refused(ours: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"callbacks: got 'a GaLoreCallback'.*galore_plugin adds it"):
        galore_plugin(CONFIG, arguments(tmp_path), [ours])
