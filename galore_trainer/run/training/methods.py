"""How each method is put into a Trainer before training, and what it does to the model after training.

``METHODS`` in ``settings/methods.py`` names these functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from galore_trainer.errors import OptionError
from galore_trainer.run.settings.methods import ADAPTER, SHARDED

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from galore_trainer.run.settings.run_config import RunConfig


class PreparedModel(NamedTuple):
    """A model as it goes into the Trainer, and the Trainer's further keyword arguments."""

    model: Any
    plugin: dict[str, Any]


def prepare_adamw(model: Any, config: RunConfig, arguments: TrainingArguments) -> PreparedModel:
    """Leave the model as it is: AdamW is the Trainer's own optimizer, with groups of ours for ``embedding_lr_scale``.

    Raises:
        OptionError: ``embedding_lr_scale`` under FSDP or DeepSpeed.
    """
    if config.embedding_lr_scale == 1.0:
        return PreparedModel(model, {})
    from galore_trainer.hf.backend import training_backend
    from galore_trainer.run.training.embedding_rates import EmbeddingRates

    if (backend := training_backend(arguments)) in SHARDED:
        wanted = f"1 under {backend}"
        way_out = "One process and DDP take other values."
        raise OptionError("embedding_lr_scale", config.embedding_lr_scale, wanted, way_out)
    settings = {"arguments": arguments, "scale": config.embedding_lr_scale}
    return PreparedModel(model, {"optimizer_cls_and_kwargs": (EmbeddingRates, settings)})


def prepare_galore(model: Any, config: RunConfig, arguments: TrainingArguments) -> PreparedModel:
    """Give the Trainer ``GaLoreAdamW``.

    Raises:
        OptionError: as ``plan_weights``.
    """
    from galore_trainer.hf.build import galore_plugin
    from galore_trainer.targets.groups import plan_weights

    plan_weights(model, config.galore)  # refuses now what the Trainer would meet after the first scoring
    return PreparedModel(model, galore_plugin(config.galore, arguments))


def prepare_adamw_8bit(model: Any, config: RunConfig, arguments: TrainingArguments) -> PreparedModel:
    """Give the Trainer the 8-bit AdamW of bitsandbytes."""
    from bitsandbytes.optim import AdamW

    # optim_bits rather than AdamW8bit: the Trainer then keeps 32 bits for embeddings, as bitsandbytes asks for
    return PreparedModel(model, {"optimizer_cls_and_kwargs": (AdamW, {**_adam(arguments), "optim_bits": 8})})


def prepare_package(model: Any, config: RunConfig, arguments: TrainingArguments) -> PreparedModel:
    """Give the Trainer the optimizer of the package that ``config.method`` names.

    Raises:
        OptionError: as ``package_groups``.
    """
    from galore_trainer.run.training.packages import PackageFactory, package_groups

    chosen: dict[str, Any] = {"method": config.method, "config": config.galore}
    package_groups(model, **chosen, lr=arguments.learning_rate, weight_decay=0.0)  # refuses now, as above
    settings = {**chosen, "weight_decay": arguments.weight_decay, **_adam(arguments)}
    return PreparedModel(model, {"optimizer_cls_and_kwargs": (PackageFactory, settings)})


def prepare_lora(model: Any, config: RunConfig, arguments: TrainingArguments) -> PreparedModel:
    """Put the adapters of ``lora`` or ``dora`` into the model.

    Raises:
        OptionError: as ``add_adapters``.
    """
    from galore_trainer.run.models.adapters import add_adapters

    return PreparedModel(add_adapters(model, config.lora, seed=arguments.seed, dora=config.method == "dora"), {})


def merge_lora(trainer: Trainer, config: RunConfig, output: Path) -> None:
    """Save the adapter into the run's folder and merge it into the trainer's model."""
    from galore_trainer.run.models.adapters import merge_adapters
    from galore_trainer.run.models.model import public_name

    merge_adapters(trainer, output / ADAPTER, base_model=public_name(config.model_name_or_path))


def _adam(arguments: TrainingArguments) -> dict[str, Any]:
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon}
