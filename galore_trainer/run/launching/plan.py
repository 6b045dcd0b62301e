"""What a run would do, in a few lines, without loading weights: the answer of ``galore-ft train --dry-run``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from galore_trainer.config import HEAD_ROLES
from galore_trainer.run.launching.start import is_taken
from galore_trainer.run.results.publish import check_publish
from galore_trainer.run.settings.arguments import check_method, training_arguments
from galore_trainer.run.settings.methods import METHODS
from galore_trainer.run.settings.run_config import RunConfig

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from galore_trainer.run.launching.launch import Launch


def describe_plan(config: RunConfig, launch: Launch | None = None) -> str:
    """Load the data, check the Trainer's arguments, and say what would be trained on what, how long and how fast.

    Args:
        config: of the run.
        launch: how it would be started, if not in this process.

    Raises:
        OptionError: data that cannot be read, arguments that transformers refuses, a method that cannot run here, a hub
            that cannot be uploaded to.
    """
    from galore_trainer.recipes import load_also, load_data

    arguments = training_arguments(config)
    check_method(config, arguments)
    destination = check_publish(config)
    data = load_data(config.data)
    also = load_also(config.eval.also, data.train)
    world = launch.processes if launch else arguments.world_size
    lines = [
        ("model", f"{config.model_name_or_path}, weights in {config.dtype}, bf16 autocast {_on(arguments.bf16)}"),
        ("method", _method(config)),
        (
            "data",
            f"{data.task} from {config.data.shown_source}: {len(data.train)} to train on, {len(data.eval)} held out",
        ),
        *(("", f"- {note}") for note in data.notes),
        *(("", f"- loss on {note}") for other in also.values() for note in other.notes),
        ("learning rate", learning_rates(config, arguments.learning_rate)),
        ("steps", steps_in_words(arguments, len(data.train), world, packing=config.packing)),
        *([("launch", f"{world} processes, {launch.name}")] if launch else ()),
        ("output", config.output_dir + _taken(config.output_dir)),
        *(("note", sentence) for sentence in config.idle_settings()),
        *([("upload", f"model, tokenizer and card to {destination.repo_id}")] if destination else ()),
    ]
    # Not a table of rich's, which would fold paths and sentences and break what is searched for.
    return "\n".join(f"{name:<14}{text}" for name, text in lines)


def learning_rates(config: RunConfig, lr: float) -> str:
    """The rates that weights move with: lr x scale for projected ones, lr x plain_lr_ratio for the others."""
    block = METHODS[config.method].block
    if block != "galore":
        if (others := config.embedding_lr_scale) != 1.0:
            return f"linear layers {lr:g}, others {lr:g} x {others:g} = {lr * others:g}"
        return f"{lr:g}, {'adapters alone' if block == 'lora' else 'all weights'}"
    galore = config.galore
    scale = galore.scale
    if isinstance(scale, str):
        product = f"{lr:g} x sqrt(n / rank) of each"
    else:
        factor = scale ** METHODS[config.method].scale_power
        product = f"{lr:g} x {factor:g} = {lr * factor:g}"
    return f"projected weights {product}, others {lr:g} x {galore.plain_lr_ratio:g} = {lr * galore.plain_lr_ratio:g}"


def count_steps(arguments: TrainingArguments, examples: int, world: int = 1) -> tuple[int, int]:
    """Optimizer steps in all and in one epoch, counted as the Trainer counts them on ``world`` processes."""
    size = arguments.train_batch_size * world
    batches = examples // size if arguments.dataloader_drop_last else math.ceil(examples / size)
    per_epoch = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    if arguments.max_steps > 0:
        return arguments.max_steps, per_epoch
    return math.ceil(arguments.num_train_epochs * per_epoch), per_epoch


def _method(config: RunConfig) -> str:
    galore, lora = config.galore, config.lora
    trainer = ", by TRL's SFTTrainer" if config.trainer == "trl" else ""
    block = METHODS[config.method].block
    if block is None:
        return config.method + trainer
    if block == "lora":
        stabilised = " over sqrt(rank)" if lora.use_rslora else ""
        return f"{config.method}: rank {lora.rank}, alpha {lora.alpha}{stabilised}, dropout {lora.dropout:g}{trainer}"
    roles = "" if galore.shared_roles in ((), HEAD_ROLES) else f" for {', '.join(galore.shared_roles)}"
    return (
        f"{config.method}: rank {galore.rank}, a new projection every {galore.update_proj_gap} steps, "
        f"heads {galore.head_sharing}{roles}, svd {galore.svd}, moments {galore.momentum_transfer}{trainer}"
    )


def steps_in_words(arguments: TrainingArguments, examples: int, world: int = 1, *, packing: bool = False) -> str:
    """Steps, the examples or rows of each, epochs and schedule: ``6 steps of 2 examples each (3 epochs of 2 steps)``.

    Args:
        arguments: of the Trainer.
        examples: that it is trained on, before they are packed.
        world: processes that share them.
        packing: whether a batch counts rows of several examples.
    """
    from transformers import SchedulerType

    total, per_epoch = count_steps(arguments, examples, world)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * world
    unit = "row" if packing else "example"
    size = f"{_count(batch, unit)} each"
    if not packing and batch > examples:  # an epoch ends before the batch is full
        size = f"all {_count(examples, unit)} each, less than the batch of {batch}"
    packed = ", fewer once they are packed" if packing else ""
    return (
        f"{_count(total, 'step')} of {size} ({_count(total / per_epoch, 'epoch')} of {_count(per_epoch, 'step')}"
        f"{packed}), warm-up {arguments.get_warmup_steps(total)}, "
        f"schedule {SchedulerType(arguments.lr_scheduler_type).value}"
    )


def _count(number: float, what: str) -> str:
    """A number with its noun: ``1 step``, ``2.5 epochs``."""
    shown = str(number) if isinstance(number, int) else f"{number:.2g}"
    return f"{shown} {what}{'' if number == 1 else 's'}"


def _taken(folder: str) -> str:
    taken = is_taken(Path(folder).expanduser())
    return " (not empty: --resume auto goes on there, --overwrite starts anew)" if taken else ""


def _on(value: object) -> str:
    return "on" if value else "off"
