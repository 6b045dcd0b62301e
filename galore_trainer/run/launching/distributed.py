"""Runs on several processes: the main process, barriers, and models whose weights are sharded."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galore_trainer.errors import OptionError
from galore_trainer.run.settings.methods import SHARDED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments

    from galore_trainer.run.settings.run_config import RunConfig

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
GATHER = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


def is_main_process() -> bool:
    """Whether this process writes the run's files and messages: the only process, or rank 0 of a launcher.

    It is asked before TrainingArguments exist. ``accelerate.PartialState`` would start the process group there, with
    timeouts and a backend of its own.
    """
    return os.environ.get("RANK", "0") == "0"


def end_with_launcher() -> None:
    """End this process when torchrun, which started it, ends, even where torchrun was killed (on Linux)."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def die_with_parent() -> None:
    """Have Linux kill this process when its parent has ended; does nothing on other systems."""
    if _LIBC is not None:
        set_parent_death_signal = 1
        _LIBC.prctl(set_parent_death_signal, signal.SIGKILL)


def shards_weights(arguments: TrainingArguments) -> bool:
    """Whether each process keeps only a part of the weights: FSDP and DeepSpeed's ZeRO-3."""
    from galore_trainer.hf.backend import training_backend

    zero = _zero(arguments)
    return zero.is_zero3() if zero else training_backend(arguments) in SHARDED


def check_sharding(arguments: TrainingArguments, checkpoint: Path | None) -> None:
    """Refuse a launch that could not save a whole model, or that does not fit the checkpoint of another launch.

    Raises:
        OptionError: a DeepSpeed configuration under which no whole model can be saved; a checkpoint that was written
            under another backend or, by DeepSpeed, another stage or number of processes.
    """
    zero = _zero(arguments)
    if zero and zero.is_zero3() and not zero.get_value(GATHER):
        raise OptionError(
            f"deepspeed.{GATHER}",
            False,
            "true, for a model that can be loaded afterwards",
            "Set it in the DeepSpeed JSON, or zero3_save_16bit_model: true in accelerate's configuration.",
        )
    if checkpoint is not None:
        from galore_trainer.hf.checkpoints import check_layout

        check_layout(checkpoint, arguments)


def check_trainer(trainer: Trainer) -> None:
    """Refuse a launch that asks for FSDP or DeepSpeed where accelerate silently uses DDP.

    Raises:
        OptionError: with the way out.
    """
    from galore_trainer.hf.backend import training_backend

    wanted, used = training_backend(trainer.args), trainer.accelerator.distributed_type.value
    if wanted in SHARDED and used != wanted.upper():
        raise OptionError(
            "backend",
            f"{wanted} on {trainer.args.device.type}",
            f"{wanted}, for which accelerate uses {used}",
            "FSDP needs GPUs; DeepSpeed runs on CPUs with use_cpu=true and without ACCELERATE_USE_CPU.",
        )


@contextlib.contextmanager
def scored_model(
    model: PreTrainedModel, arguments: TrainingArguments, source: str, config: RunConfig
) -> Iterator[PreTrainedModel]:
    """The model that this process scores: the trained one where it is whole, else one loaded from a file.

    Args:
        model: that is trained.
        arguments: of the Trainer.
        source: what to load where weights are sharded, as for ``load_model``.
        config: of the run, which says how to load it.
    """
    if not shards_weights(arguments):
        yield model
        return
    from galore_trainer.run.models.model import load_model

    with _without_zero3(arguments):
        whole, _ = load_model(source, **config.loading)
        yield whole.to(arguments.device)  # type: ignore[arg-type]


def save_whole_model(trainer: Trainer, folder: Path) -> None:
    """Save a model that ``from_pretrained`` loads, gathered where its weights are sharded; all processes call it."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()


@contextlib.contextmanager
def _without_zero3(arguments: TrainingArguments) -> Iterator[None]:
    """Let transformers load and run whole models; under ZeRO-3 it would shard them and wait for the other processes."""
    if not _zero(arguments):
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin: Any = getattr(arguments, "deepspeed_plugin", None)
        set_hf_deepspeed_config(getattr(plugin, "dschf", None) or plugin.hf_ds_config)


def _zero(arguments: TrainingArguments) -> Any:
    """DeepSpeed's configuration as accelerate keeps it; None without DeepSpeed."""
    plugin: Any = getattr(arguments, "deepspeed_plugin", None)
    return plugin.hf_ds_config if plugin else None
