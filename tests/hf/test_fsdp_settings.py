"""A checkpoint of FSDP2 under other settings is refused by name, before torch looks for tensors that it lacks."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as distributed_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from galore_trainer import GaLoreConfig, attach
from galore_trainer.errors import OptionError
from galore_trainer.hf import build
from galore_trainer.hf.checkpoints import check_settings_of_fsdp, resumed_from
from galore_trainer.optim.saved_groups import saved_settings

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "checkpoints" / "fsdp2" / "checkpoint-6"
"""It was written before there were other residuals than the sparse one."""
SETTINGS: dict[str, Any] = {
    **{"rank": 4, "update_proj_gap": 4, "residual_warmup_steps": 2, "proj_type": "right"},
    **{"state_bits": 16, "plain_state_bits": 16, "basis_bits": 8},
}


class Loading(Exception):
    """The Trainer got to the place where it would load the checkpoint."""


def resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Any = str(CHECKPOINT), **more: Any) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 23, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, vocab_size=32, num_hidden_layers=1))
    args = TrainingArguments(str(tmp_path), max_steps=9, use_cpu=True, report_to="none", seed=3)
    trainer = Trainer(model, args, train_dataset=[{"input_ids": [3, 4], "labels": [3, 4]}])
    attach(trainer, GaLoreConfig(**{**SETTINGS, **more}))
    monkeypatch.setattr(build, "training_backend", lambda args=None: "fsdp")

    def load(*_: Any) -> None:
        raise Loading

    monkeypatch.setattr(trainer, "_load_from_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(trainer, "_load_optimizer_and_scheduler", load)
    trainer.train(resume_from_checkpoint=checkpoint)


def test_the_residual_of_its_time_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"galore\.residual: got 'scaled', wanted 'sparse' .*galore\.residual=sparse"):
        resume(monkeypatch, tmp_path)


def test_a_path_is_read_like_a_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"galore\.residual: got 'scaled', wanted 'sparse'"):
        resume(monkeypatch, tmp_path, CHECKPOINT)


def test_other_settings_are_named_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    same = {"residual_percent": 10.0}
    with pytest.raises(OptionError, match=r"galore\.basis_bits: got 32, wanted 8 .*galore\.basis_bits=8"):
        resume(monkeypatch, tmp_path, **same, basis_bits=32)
    with pytest.raises(OptionError, match=r"galore\.residual_percent: got 5\.0, wanted 10\.0"):
        resume(monkeypatch, tmp_path, residual_percent=5.0)


def test_the_same_settings_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(Loading):
        resume(monkeypatch, tmp_path, residual_percent=10.0)


def test_ranks_of_single_modules_go_on(tmp_path: Path) -> None:
    """``torch.distributed.checkpoint`` saves the entries of a mapping under names of their own."""
    config = GaLoreConfig(rank=8, rank_pattern={"self_attn.q_proj": 4, r".*\.layers\.0\..*": 2})
    group = {"projected": True, "galore": config.trajectory() | {"scale": config.scale, "seed": 0}}
    checkpoint = tmp_path / CHECKPOINT.name
    shutil.copytree(CHECKPOINT, checkpoint, ignore=shutil.ignore_patterns("optimizer_0"))
    saved = {"state": {"w": {"step": torch.ones(())}}, "param_groups": [{"galore": saved_settings(group)}]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it saves in one process
        distributed_checkpoint.save({"optimizer": saved}, checkpoint_id=checkpoint / "optimizer_0", no_dist=True)
    check_settings_of_fsdp(checkpoint, [group])
    group["galore"] = GaLoreConfig(rank=8).trajectory() | {"scale": config.scale, "seed": 0}
    with pytest.raises(OptionError, match=r"galore\.rank_pattern: got \{\}, wanted \{'self_attn\.q_proj': 4"):
        check_settings_of_fsdp(checkpoint, [group])


def test_other_kinds_and_other_callers_are_left_alone() -> None:
    check_settings_of_fsdp(CHECKPOINT.parents[1] / "ddp" / CHECKPOINT.name, [])
    resume_from_checkpoint = str(CHECKPOINT)  # no Trainer's
    assert resumed_from() is None, resume_from_checkpoint
