"""GaLore+ inside axolotl: ``plugins: [galore_trainer.integrations.axolotl.GaLorePlugin]`` and a block ``galore:``.

The block takes the fields of ``GaLoreConfig`` and is checked when axolotl reads its file. axolotl 0.19 publishes the
hook ``create_optimizer`` and never calls it; ``add_callbacks_post_trainer``, which it calls for every kind of Trainer,
puts the optimizer there, and ``create_optimizer`` returns the same one for versions that call it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, model_validator
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.hf.arguments import ADAMW, UNUSED
from galore_trainer.hf.attach import checked_plugin
from galore_trainer.hf.build import GaLoreFactory
from galore_trainer.hf.checkpoints import check_resumable
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.run.settings.run_config import RunConfig

NAME = "GaLorePlugin"
ONE_RATE = ("one_cycle", "rex")
"""Schedules of axolotl that give every group of the optimizer the same learning rate."""


class GaLoreArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    galore: dict[str, Any] | None = Field(
        default=None, json_schema_extra={"description": "Fields of galore_trainer.GaLoreConfig"}
    )

    @model_validator(mode="before")
    @classmethod
    def check(cls, data: Any) -> Any:
        """Check the block, and that no other key asks for another optimizer.

        Raises:
            OptionError: what ``configured`` refuses; pydantic adds it to its own error.
        """
        if isinstance(data, Mapping) and _is_asked(data):
            configured(data)
        return data


class GaLorePlugin(BasePlugin):
    """Trains axolotl's model with GaLore+: SFT, DPO and its other Trainers, on one process, DDP, FSDP2 and ZeRO.

    Learning rate, betas, eps, weight decay, seed, schedule and checkpoints are axolotl's own.

    Raises:
        OptionError: from the hooks: what ``attach`` refuses; a checkpoint to resume that this launch cannot read.
    """

    def get_input_args(self) -> str:
        """The dotted name of the settings that the plugin adds."""
        return f"{__name__}.{GaLoreArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """Give the Trainer the optimizer, which it makes when training starts; axolotl adds the callback."""
        if not _is_asked(cfg):
            return []
        plugin = checked_plugin(trainer, configured(cfg))
        if resume := _checkpoint(cfg):
            check_resumable(resume, trainer.args)
        trainer.optimizer_cls_and_kwargs = plugin["optimizer_cls_and_kwargs"]
        return plugin["callbacks"]

    def create_optimizer(self, cfg: Any, trainer: Any) -> GaLoreAdamW | None:
        """The optimizer of the Trainer's model; None where the configuration does not name the plugin."""
        if not _is_asked(cfg):
            return None
        given = trainer.optimizer_cls_and_kwargs
        if given is None or given[0] is not GaLoreFactory:
            given = checked_plugin(trainer, configured(cfg))["optimizer_cls_and_kwargs"]
        factory, settings = given
        return factory()(trainer.model, **settings)


def configured(cfg: Mapping[str, Any]) -> GaLoreConfig:
    """The block ``galore`` of axolotl's configuration; ``GaLoreConfig()`` without one.

    Raises:
        OptionError: an unknown name or an impossible value in the block; a key beside it that asks for another
            optimizer or for other learning rates, which would be ignored.
    """
    optimizer = cfg.get("optimizer")
    optimizer = getattr(optimizer, "value", optimizer)
    if optimizer is not None and optimizer not in ADAMW:
        way_out = "The plugin brings the optimizer: leave optimizer out. For a smaller state see galore.state_bits."
        raise OptionError("optimizer", optimizer, f"nothing or {' or '.join(ADAMW)}, beside {NAME}", way_out)
    for key, way_out in UNUSED.items():
        if value := cfg.get(key):
            raise OptionError(key, value, f"nothing, beside {NAME}", way_out)
    block = cfg.get("galore")
    config = GaLoreConfig() if block is None else RunConfig.from_dict({"galore": _plain(block)}).galore
    schedule = cfg.get("lr_scheduler")
    if schedule in ONE_RATE and config.plain_lr_ratio != 1.0:
        way_out = f"lr_scheduler: {schedule} gives every weight the same rate: use cosine, or write plain_lr_ratio: 1."
        raise OptionError("galore.plain_lr_ratio", config.plain_lr_ratio, f"1 under lr_scheduler {schedule}", way_out)
    return config


def _is_asked(cfg: Mapping[str, Any]) -> bool:
    """Whether a configuration names the plugin: axolotl keeps plugins of an earlier one in the same process."""
    names = cfg.get("plugins")
    return not names or any(str(name).rpartition(".")[2] == NAME for name in names)


def _checkpoint(cfg: Mapping[str, Any]) -> str | None:
    """The checkpoint that axolotl will resume."""
    if cfg.get("resume_from_checkpoint"):
        return str(cfg["resume_from_checkpoint"])
    return get_last_checkpoint(cfg["output_dir"]) if cfg.get("auto_resume_from_checkpoints") else None


def _plain(block: Any) -> Any:
    """A block without the dictionary class of axolotl, at every level."""
    if isinstance(block, Mapping):
        return {key: _plain(value) for key, value in block.items()}
    return [_plain(value) for value in block] if isinstance(block, list) else block
