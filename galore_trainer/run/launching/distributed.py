"""What a run does otherwise on several processes: waiting for each other, and models whose weights are cut."""

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

    from galore_trainer.run.models.model import Dtype

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
GATHER = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


def is_main_process() -> bool:
    """Whether this process writes a run's files and speaks for it: the only one, or rank 0 of a launcher's.

    It is asked before TrainingArguments exist. ``accelerate.PartialState`` would start the process group there, with
    timeouts and a backend of its own.
    """
    return os.environ.get("RANK", "0") == "0"


def end_with_launcher() -> None:
    """End this process as torchrun, which started it, ends: killed itself, that could not end it (on Linux)."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def die_with_parent() -> None:
    """Have the system kill this process once the one that started it has ended; does nothing but on Linux."""
    if _LIBC is not None:
        set_parent_death_signal = 1
        _LIBC.prctl(set_parent_death_signal, signal.SIGKILL)


def shards_state(arguments: TrainingArguments) -> bool:
    """Whether a process keeps a part of the optimizer's state alone: FSDP and DeepSpeed."""
    from galore_trainer.hf.backend import training_backend

    return training_backend(arguments) in SHARDED


def cuts_weights(arguments: TrainingArguments) -> bool:
    """Whether a process keeps a part of the weights alone: FSDP and DeepSpeed's ZeRO-3."""
    zero = _zero(arguments)
    return zero.is_zero3() if zero else shards_state(arguments)


def check_sharding(arguments: TrainingArguments, checkpoint: Path | None) -> None:
    """Refuse before training what would fail after it, or what a checkpoint of another launch cannot give.

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
    """Refuse a launch that asks for FSDP or DeepSpeed where accelerate trains under DDP without a word.

    Raises:
        OptionError: with the way out.
    """
    from galore_trainer.hf.backend import training_backend

    asked, kind = training_backend(trainer.args), trainer.accelerator.distributed_type.value
    if asked in SHARDED and kind != asked.upper():
        raise OptionError(
            "backend",
            f"{asked} on {trainer.args.device.type}",
            f"{asked}, for which accelerate uses {kind}",
            "FSDP needs GPUs; DeepSpeed runs on CPUs with use_cpu=true and without ACCELERATE_USE_CPU.",
        )


@contextlib.contextmanager
def scored_model(
    model: PreTrainedModel, arguments: TrainingArguments, source: str, dtype: Dtype
) -> Iterator[PreTrainedModel]:
    """The model that this process scores by itself: the trained one where it is whole, else another one from a file.

    Args:
        model: that is trained.
        arguments: of the Trainer.
        source: what to load where weights are cut, as for ``load_model``.
        dtype: of its weights.
    """
    if not cuts_weights(arguments):
        yield model
        return
    from galore_trainer.run.models.model import load_model

    with _without_zero3(arguments):
        whole, _ = load_model(source, dtype=dtype)
        yield whole.to(arguments.device)  # type: ignore[arg-type]


def save_whole_model(trainer: Trainer, folder: Path) -> None:
    """Save a model that ``from_pretrained`` loads, gathered where its weights are cut; all processes call it."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()


@contextlib.contextmanager
def _without_zero3(arguments: TrainingArguments) -> Iterator[None]:
    """Let transformers load and run models whole; under ZeRO-3 it would cut them and wait for the other processes."""
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
