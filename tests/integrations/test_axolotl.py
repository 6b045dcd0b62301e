"""The plugin of axolotl trains with GaLore+, resumes bit for bit, and refuses what it would make axolotl ignore."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from documents import ROOT, blocks
from galore_trainer import GaLoreAdamW, GaLoreCallback, OptionError
from galore_trainer.hf.callback import unwrap_optimizer
from galore_trainer.run.settings.yaml_io import read_mapping
from tiny_training import arguments, rows

NAME = "galore_trainer.integrations.axolotl.GaLorePlugin"
BLOCK = {"rank": 4, "update_proj_gap": 2}


def validated(manager: Any, cfg: dict[str, Any]) -> dict[str, Any]:
    """A configuration as axolotl's own class, with the plugins' in it, reads and writes it."""
    from pydantic import BaseModel, ConfigDict, create_model

    for name in cfg["plugins"]:
        manager.register(name)
    homes = [name.rpartition(".") for name in manager.get_input_args()]
    bases = tuple(getattr(importlib.import_module(module), name) for module, _, name in homes)
    own = create_model("AxolotlInputConfig", __base__=BaseModel, __config__=None)
    merged = type("Merged", (own, *bases), {"model_config": ConfigDict(extra="allow")})
    return merged(**cfg).model_dump(exclude_none=True)


def as_axolotl_trains(base: Any, cfg: dict[str, Any], model: Any, **settings: Any) -> Any:
    """A Trainer made, given the plugins' callbacks, and trained in the order of axolotl's builder."""
    manager = base.PluginManager()
    manager.plugins.clear()
    cfg = validated(manager, {"plugins": [NAME], "output_dir": "none", **cfg})
    mixin = importlib.import_module("axolotl.core.trainers.mixins.optimizer").OptimizerMixin
    args = arguments(Path(cfg["output_dir"]), **settings)
    for name in ("loraplus_lr_ratio", "embedding_lr_scale", "embedding_lr", "lr_groups"):
        setattr(args, name, None)
    trainer = mixin(model=model, args=args, train_dataset=rows())
    for callback in manager.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=cfg.get("resume_from_checkpoint"))
    return trainer


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_model_trains_with_galore_and_resumes_bit_for_bit(
    layerwise: bool, axolotl: Any, tiny_llama: Any, tmp_path: Path
) -> None:
    before = copy.deepcopy(tiny_llama)
    cfg = {"galore": {**BLOCK, "layerwise": layerwise}, "output_dir": str(tmp_path)}
    trainer = as_axolotl_trains(axolotl, cfg, tiny_llama, save_strategy="steps", save_steps=2)
    optimizer = unwrap_optimizer(trainer.optimizer)
    assert (optimizer.config.rank, optimizer.config.layerwise) == (4, layerwise)
    assert sum(isinstance(callback, GaLoreCallback) for callback in trainer.callback_handler.callbacks) == 1
    assert "galore/state_bytes" in trainer.state.log_history[0]
    start = dict(before.named_parameters())
    assert [name for name, p in optimizer.projected_weights() if torch.equal(p, start[name])] == []
    as_axolotl_trains(axolotl, {**cfg, "resume_from_checkpoint": str(tmp_path / "checkpoint-2")}, before)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), tiny_llama.parameters(), strict=True))


def test_a_configuration_without_the_block_takes_the_defaults(axolotl: Any, tiny_llama: Any) -> None:
    trainer = as_axolotl_trains(axolotl, {}, tiny_llama)
    assert unwrap_optimizer(trainer.optimizer).config.rank == 32


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        ({"galore": {"rnak": 4}}, "galore.rnak: got 4, wanted a known key. Did you mean 'galore.rank'?"),
        ({"galore": {"rank": 0}}, "galore.rank: got 0, wanted an integer of at least 1"),
        ({"galore": {"rank": 4, "target_modules": "all"}}, "Write 'all-linear'"),
        ({"galore": True}, "wanted a mapping"),
        ({"optimizer": "galore_adamw"}, "optimizer: got 'galore_adamw', wanted nothing or adamw_torch"),
        ({"optimizer": "muon"}, "optimizer: got 'muon'"),
        ({"optim_args": {"rank": 4}}, "optim_args: got"),
        ({"optim_target_modules": ["mlp"]}, "Use target_modules"),
        ({"embedding_lr": 1e-5}, "embedding_lr: got 1e-05, wanted nothing, beside GaLorePlugin. Use plain_lr_ratio"),
        ({"lr_groups": [{"name": "a"}]}, "lr_groups: got"),
        ({"loraplus_lr_ratio": 2.0}, "It is for adapters"),
        ({"lr_scheduler": "one_cycle", "galore": {"plain_lr_ratio": 0.5}}, "wanted 1 under lr_scheduler one_cycle"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused_with_the_file(
    cfg: dict[str, Any], named: str, axolotl: Any
) -> None:
    from pydantic import ValidationError

    manager = axolotl.PluginManager()
    manager.plugins.clear()
    with pytest.raises(ValidationError) as caught:
        validated(manager, {"plugins": [NAME], **cfg})
    assert named in str(caught.value)


def test_what_is_known_when_the_trainer_is_there_is_refused_then(
    axolotl: Any, tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = {"galore": BLOCK, "output_dir": str(tmp_path)}
    as_axolotl_trains(axolotl, cfg, tiny_llama, save_strategy="steps", save_steps=2, save_only_model=True)
    with pytest.raises(OptionError, match="a checkpoint with the optimizer's state"):
        as_axolotl_trains(axolotl, {**cfg, "auto_resume_from_checkpoints": True}, tiny_llama)
    with pytest.raises(OptionError, match="optim: got 'adafactor'"):
        as_axolotl_trains(axolotl, cfg, tiny_llama, optim="adafactor")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(OptionError, match=r"galore\.layerwise: got 'true, under fsdp'"):
        plugin_of(axolotl).add_callbacks_post_trainer({"galore": {"layerwise": True}}, untrained(tiny_llama, tmp_path))


def plugin_of(base: Any) -> Any:
    plugin = importlib.import_module("galore_trainer.integrations.axolotl").GaLorePlugin()
    assert isinstance(plugin, base.BasePlugin)
    return plugin


def untrained(model: Any, folder: Path) -> Any:
    from transformers import Trainer

    return Trainer(model=model, args=arguments(folder), train_dataset=rows())


def test_the_hook_for_optimizers_returns_the_one_of_the_trainer(axolotl: Any, tiny_llama: Any, tmp_path: Path) -> None:
    plugin, trainer, cfg = plugin_of(axolotl), untrained(tiny_llama, tmp_path), {"galore": BLOCK}
    alone = plugin.create_optimizer(cfg, trainer)
    assert type(alone) is GaLoreAdamW
    assert trainer.optimizer_cls_and_kwargs is None
    (callback,) = plugin.add_callbacks_post_trainer(cfg, trainer)
    assert isinstance(callback, GaLoreCallback)
    after = plugin.create_optimizer(cfg, trainer)
    assert (after.config, after.defaults) == (alone.config, alone.defaults)
    assert after.defaults["lr"] == trainer.args.learning_rate


def test_a_plugin_of_an_earlier_configuration_stays_away(axolotl: Any, tiny_llama: Any, tmp_path: Path) -> None:
    plugin, trainer = plugin_of(axolotl), untrained(tiny_llama, tmp_path)
    cfg = {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "optimizer": "muon"}
    assert plugin.add_callbacks_post_trainer(cfg, trainer) == []
    assert plugin.create_optimizer(cfg, trainer) is None
    assert trainer.optimizer_cls_and_kwargs is None


def test_the_file_of_the_page_is_read(axolotl: Any) -> None:
    (block,) = (b for b in blocks(ROOT / "docs" / "integrations.md", "yaml") if "plugins" in b.code)
    manager = axolotl.PluginManager()
    manager.plugins.clear()
    cfg = read_mapping(block.code, "page").data
    assert json.loads(json.dumps(validated(manager, cfg))) == cfg
