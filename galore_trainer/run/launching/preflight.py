"""Checks before training: the method, the trackers, the model, the output folder, and room on the disk."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galore_trainer.errors import OptionError
from galore_trainer.run.launching.checkpoints import checkpoints
from galore_trainer.run.launching.plan import count_steps
from galore_trainer.run.launching.start import check_folder
from galore_trainer.run.settings.arguments import check_method, check_samples, run_arguments
from galore_trainer.run.settings.methods import METHODS, resolve
from galore_trainer.run.settings.run_config import RunConfig

if TYPE_CHECKING:
    from transformers import TrainingArguments

TRACKERS = "report_to"
OFFLINE = ("offline", "disabled", "dryrun")  # of WANDB_MODE


def check_all(config: RunConfig, processes: int | None = None) -> None:
    """Check what would stop a run before its first step or at its end; loads no weights, writes nothing.

    Args:
        config: of the run.
        processes: of the run, where it is to be launched.

    Raises:
        OptionError: a method, a tracker, a model, its modules or the output folder that cannot be used, a full disk.
    """
    from galore_trainer.recipes import load_also, load_data

    arguments = run_arguments(config)
    check_method(config, arguments)
    check_output(config)
    check_trackers(arguments)
    data = load_data(config.data)
    load_also(config.eval.also, data.train)
    check_samples(config, data.eval)
    if (model := _model(config, arguments)) is not None:
        check_room(config, arguments, model, len(data.train), processes or arguments.world_size)


def check_output(config: RunConfig) -> None:
    """Raise ``OptionError`` where a run's folder cannot be written."""
    output = Path(config.output_dir).expanduser()
    check_folder(output)
    folder = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError("output_dir", str(output), "a folder to write in", f"Nothing can be written in {folder}.")


def check_trackers(arguments: TrainingArguments) -> None:
    """Raise ``OptionError`` for a tracker that cannot be started here."""
    for name in arguments.report_to or ():
        _check_tracker(name)


def _check_tracker(name: str) -> None:
    from transformers import integrations

    missing = name in integrations.INTEGRATION_TO_CALLBACK and name not in (
        *integrations.get_available_reporting_integrations(),
        "azure_ml",
        "flyte",  # the list may omit these two
    )
    try:
        if missing:
            raise ImportError(f"{name} is not installed")
        for callback in integrations.get_reporting_integration_callbacks([name]):
            callback()
        if name == "wandb" and os.environ.get("WANDB_MODE") not in OFFLINE:
            import wandb

            wandb.login()
    except Exception as error:  # each tracker has errors of its own
        way_out = f"{' '.join(str(error).split()).rstrip('.')}. Or leave it out: {TRACKERS}=none."
        raise OptionError(TRACKERS, name, "a tracker that can be started here", way_out) from error


def check_room(config: RunConfig, arguments: TrainingArguments, model: Any, examples: int, processes: int = 1) -> None:
    """Raise ``OptionError`` where the disk has no room for a run's checkpoints and its model.

    Args:
        config: of the run.
        arguments: of the Trainer.
        model: as ``METHODS[...].prepare`` left it, perhaps on the meta device.
        examples: that it is trained on.
        processes: that share them.
    """
    from galore_trainer.tables import human_bytes

    size, model_size = checkpoint_bytes(config, model, only_model=arguments.save_only_model)
    count = _checkpoints(arguments, examples, processes)
    output = Path(config.output_dir).expanduser()
    folder = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    replaced = sum(
        path.stat().st_size for folder in checkpoints(output) for path in folder.rglob("*") if path.is_file()
    )
    needed = count * size + model_size
    free = shutil.disk_usage(folder).free + replaced  # a run removes its older checkpoints
    if needed > free:
        raise OptionError(
            "output_dir",
            str(output),
            f"room for {human_bytes(needed)}: {count} checkpoints of {human_bytes(size)}, and the model",
            f"{human_bytes(free)} are free: free some space, lower save_total_limit, or give another --output-dir.",
        )


def checkpoint_bytes(config: RunConfig, model: Any, *, only_model: bool = False) -> tuple[int, int]:
    """About what a checkpoint takes on the disk, and what the model takes at the end.

    Args:
        config: of the run.
        model: as ``METHODS[...].prepare`` left it, perhaps on the meta device.
        only_model: leave out the optimizer's state.
    """
    from galore_trainer.run.memory.estimate import adam_state
    from galore_trainer.targets.groups import plan_weights

    block = METHODS[config.method].block
    saved = [p.nbytes for p in model.parameters() if p.requires_grad or block != "lora"]
    whole = sum(p.nbytes for p in model.parameters())  # with the adapters, which have a folder of their own
    if only_model:
        return sum(saved), whole
    if block == "galore":
        state = sum(sum(w.state_bytes(config.galore).values()) for w in plan_weights(model, config.galore))
    else:
        state = sum(adam_state(model, eight_bit=config.method == "adamw_8bit").values())
    return sum(saved) + state, whole


def _checkpoints(arguments: TrainingArguments, examples: int, processes: int) -> int:
    """The most checkpoints that lie on the disk at a time: a new one is written before an old one goes."""
    from transformers.trainer_utils import SaveStrategy

    strategy = SaveStrategy(arguments.save_strategy)
    if strategy == SaveStrategy.NO:
        return 0
    steps, interval = count_steps(arguments, examples, processes)
    if strategy == SaveStrategy.STEPS:  # a share of all steps where it is below 1
        interval = math.ceil(arguments.save_steps if arguments.save_steps >= 1 else steps * arguments.save_steps)
    saves = 1 if strategy == SaveStrategy.BEST else max(math.ceil(steps / max(interval, 1)), 1)
    limit = arguments.save_total_limit
    return min(saves, limit + 1) if limit and limit > 0 else saves


def _model(config: RunConfig, arguments: TrainingArguments) -> Any:
    """A run's model without weights, prepared for its method; None where that needs the weights."""
    import torch

    from galore_trainer.run.memory.estimate import empty_model
    from galore_trainer.run.models.model import EMBEDDED, find_embedded_gguf, is_converted, load_tokenizer

    if config.model_name_or_path == EMBEDDED and not is_converted():  # converting would take half a minute
        find_embedded_gguf()
        return None
    load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    model = empty_model(config)
    with torch.device("meta"):
        return resolve(METHODS[config.method].prepare)(model, config, arguments).model
