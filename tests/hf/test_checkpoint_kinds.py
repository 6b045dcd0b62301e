"""A checkpoint of weights only is called so wherever it is resumed, exported or imported."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer

from galore_trainer import GaLoreCallback, OptionError, build_optimizer, export_state, galore_plugin
from galore_trainer.hf.checkpoints import check_importable, check_layout, written_by
from tiny_training import CONFIG, arguments, rows


def train(model: Any, folder: Path, resume: Path | None = None, **more: Any) -> Path:
    args = arguments(folder, save_strategy="steps", save_steps=2, **more)
    trainer = Trainer(model, args, train_dataset=rows(), **galore_plugin(CONFIG, args))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return folder / "checkpoint-2"


def test_weights_only_are_refused_with_their_cause(tiny_llama: Any, tmp_path: Path) -> None:
    checkpoint = train(copy.deepcopy(tiny_llama), tmp_path / "a", save_only_model=True)
    assert written_by(checkpoint) == "weights"
    says = r"holds weights only \(save_only_model\).*start a new run from them.*model_name_or_path"
    args = arguments(tmp_path / "b", resume_from_checkpoint=str(checkpoint))
    for refuse in (
        lambda: train(copy.deepcopy(tiny_llama), tmp_path / "b", checkpoint),
        lambda: galore_plugin(CONFIG, args),
        lambda: check_layout(checkpoint, args),
        lambda: export_state(checkpoint, tmp_path / "never"),
        lambda: check_importable(checkpoint),
    ):
        with pytest.raises(OptionError, match=says):
            refuse()
    with pytest.raises(OptionError, match=says) as refused:
        train(copy.deepcopy(tiny_llama), tmp_path / "a", checkpoint)
    assert "another launch" not in str(refused.value)
    assert not (tmp_path / "never").exists()


def test_optimizers_without_a_state_are_refused_likewise(tiny_llama: Any, tmp_path: Path) -> None:
    checkpoint = train(copy.deepcopy(tiny_llama), tmp_path, save_only_model=True)
    optimizers = (build_optimizer(tiny_llama, CONFIG), None)
    trainer = Trainer(
        tiny_llama, arguments(tmp_path), train_dataset=rows(), optimizers=optimizers, callbacks=[GaLoreCallback()]
    )
    with pytest.raises(OptionError, match=r"at step 2 whose optimizer has no state.*It holds weights only"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["optimizer.pt", "scheduler.pt"], "ddp"),
        (["scheduler.pt"], "ddp"),
        (["optimizer_0/x", "scheduler.pt"], "fsdp"),
        (["optimizer.bin"], "fsdp"),
        (["global_step2/x", "latest"], "deepspeed"),
        (["model.safetensors", "trainer_state.json", "training_args.bin"], "weights"),
        (["pytorch_model_fsdp_0/x", "trainer_state.json"], "weights"),
        (["adapter_model.safetensors"], "weights"),
    ],
)
def test_the_kind_of_a_checkpoint(files: list[str], kind: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert written_by(tmp_path) == kind


def test_weights_only_are_refused_under_every_backend(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    zero = SimpleNamespace(hf_ds_config=SimpleNamespace(is_zero3=lambda: False))
    for args in (SimpleNamespace(), SimpleNamespace(fsdp=True), SimpleNamespace(deepspeed_plugin=zero, world_size=2)):
        with pytest.raises(OptionError, match=f"{tmp_path}.*wanted a checkpoint with the optimizer's state"):
            check_layout(tmp_path, args)
