"""ms-swift's optimizer callback trains with GaLore+, resumes bit for bit, and refuses what it would ignore."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import published
from documents import ROOT, blocks
from galore_trainer import GaLoreCallback, GaLoreConfig, OptionError
from galore_trainer.hf.callback import unwrap_optimizer
from tiny_training import CONFIG, arguments, rows


def trainer_of(swift: Any, model: Any, folder: Path, config: Any = CONFIG, **settings: Any) -> Any:
    importlib.import_module("galore_trainer.integrations.ms_swift").register(config)
    args = arguments(folder, published.SwiftArguments, optimizer="galore_plus", **settings)
    return published.swift_trainer(swift.optimizers_map)(model, args, train_dataset=rows())


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_model_trains_with_galore_and_resumes_bit_for_bit(
    layerwise: bool, swift: Any, tiny_llama: Any, tmp_path: Path
) -> None:
    config = GaLoreConfig(rank=4, update_proj_gap=2, layerwise=layerwise)
    more = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    fresh = copy.deepcopy(tiny_llama)
    trainer = trainer_of(swift, tiny_llama, tmp_path, config, **more)
    trainer.train()
    assert unwrap_optimizer(trainer.optimizer).config == config
    assert sum(isinstance(callback, GaLoreCallback) for callback in trainer.callback_handler.callbacks) == 1
    assert "galore/state_bytes" in trainer.state.log_history[0]
    checkpoint = str(tmp_path / "checkpoint-2")
    again = trainer_of(swift, fresh, tmp_path, config, resume_from_checkpoint=checkpoint, **more)
    again.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), tiny_llama.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_galore": True}, "use_galore: got True"),
        ({"galore_rank": 64}, "galore_rank: got 64, wanted its default"),
        ({"vit_lr": 1e-5}, "vit_lr: got 1e-05"),
        ({"optim": "adafactor"}, "optim: got 'adafactor'"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(
    settings: dict[str, Any], named: str, swift: Any, tiny_llama: Any, tmp_path: Path
) -> None:
    with pytest.raises(OptionError) as caught:
        trainer_of(swift, tiny_llama, tmp_path, **settings)
    assert str(caught.value).startswith(named)


def test_what_is_no_configuration_is_refused(swift: Any) -> None:
    register = importlib.import_module("galore_trainer.integrations.ms_swift").register
    with pytest.raises(OptionError, match=r"Use register\(GaLoreConfig"):
        register({"rank": 4})


def test_the_file_of_the_page_registers_its_configuration(swift: Any, tiny_llama: Any, tmp_path: Path) -> None:
    (block,) = (b for b in blocks(ROOT / "docs" / "integrations.md", "python") if "ms_swift" in b.code)
    exec(compile(block.code.replace("rank=64", "rank=4"), "snippet", "exec"), {})
    args = arguments(tmp_path, published.SwiftArguments, optimizer="galore_plus")
    trainer = published.swift_trainer(swift.optimizers_map)(tiny_llama, args, train_dataset=rows())
    trainer.train()
    config = unwrap_optimizer(trainer.optimizer).config
    assert (config.rank, config.layerwise) == (4, True)
