"""The result of a finished run: ``result.json``, the summary on the terminal, the files beside the model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galore_trainer.run.files import write_file, write_json
from galore_trainer.run.results.artifacts import environment, plot_losses
from galore_trainer.run.scoring.scores import in_words
from galore_trainer.run.settings.methods import ADAPTER, METHODS, SHARDED
from galore_trainer.run.settings.run_config import RESOLVED_CONFIG, RunConfig

if TYPE_CHECKING:
    from transformers import Trainer

    from galore_trainer.recipes.base import TaskData

RESULT, LOG = "result.json", "log.jsonl"


def seconds(trainer: Trainer, timing: Any) -> dict[str, float]:
    """Seconds of training by part, without the diagnosis of refreshes, which is not part of the method."""
    from galore_trainer.run.results.figures import optimizer_seconds

    measured = timing.stopwatch.seconds()
    parts = ("diagnosis", "refresh", "update", "plain")
    diagnosis, refresh, *updates = (optimizer_seconds(trainer.optimizer, part) for part in parts)
    step = measured.get("step", 0.0) - diagnosis
    # DeepSpeed takes its step inside the backward pass, where the Trainer's callbacks do not see it.
    optimizer = max(measured.get("optimizer", 0.0) - diagnosis, refresh + sum(updates))
    return {"training": step, "forward_backward": step - optimizer, "refresh": refresh, "update": optimizer - refresh}


def make_result(
    config: RunConfig,
    trainer: Trainer,
    data: TaskData,
    before: Any,
    after: Any,
    peak: dict[str, Any],
    resumed_from: int | None,
) -> dict[str, Any]:
    """The content of ``result.json``, all but counts and times.

    Args:
        config: of the run.
        trainer: after training.
        data: what it was trained and scored on.
        before, after: scores as ``evaluate_examples`` returns them, or None.
        peak: from ``PeakMemory``.
        resumed_from: the step of the checkpoint it went on from.
    """
    from galore_trainer.hf.backend import training_backend
    from galore_trainer.run.memory.estimate import predict
    from galore_trainer.run.results.figures import optimizer_figures

    backend = training_backend(trainer.args)
    uncounted = {"peak_bytes": None, "note": f"counted for whole weights and state, which {backend} shards"}

    history = trainer.state.log_history
    return {
        "method": config.method,
        "trainer": config.trainer,
        "learning_rate": trainer.args.learning_rate,
        "task": data.task,
        "seed": trainer.args.seed,
        "backend": backend,
        "processes": trainer.args.world_size,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "resumed_from_step": resumed_from,
        "overruled_by_checkpoint": _overruled(trainer),
        "train_examples": len(data.train),
        "score_before": before,
        "score_after": after,
        "train_loss": next((row["loss"] for row in reversed(history) if "loss" in row), None),
        "peak_memory": peak,
        "predicted_memory": uncounted
        if backend in SHARDED
        else predict(config, trainer.train_dataset, trainer.args.world_size),
        "environment": environment(),
        "data_notes": data.notes,
        "config": config.to_dict(),
        **optimizer_figures(trainer.optimizer),
    }


def write_artifacts(output: Path, config: RunConfig, trainer: Trainer, result: dict[str, Any]) -> None:
    """Write the loss plot, the model's card and, as the last file of a run, ``result.json``."""
    from galore_trainer.run.results.card import model_card

    gap = config.galore.update_proj_gap
    projects = METHODS[config.method].block == "galore"
    refreshes = range(1, result["steps"] + 1, gap) if projects and result["steps"] / gap <= 50 else ()
    plot_losses(output / "loss.png", trainer.state.log_history, refresh_steps=list(refreshes))
    card = model_card(
        config,
        before=result["score_before"],
        after=result["score_after"],
        environment=result["environment"],
        launch=_launch(trainer),
        overruled=result["overruled_by_checkpoint"],
    )
    write_file(output / "model" / "README.md", card)
    write_json(output / RESULT, result)


def _overruled(trainer: Trainer) -> str:
    """Settings that a resumed checkpoint kept in place of those that were asked for; see ``hf.arguments.overruled``."""
    from galore_trainer.hf.callback import GaLoreCallback

    callbacks = trainer.callback_handler.callbacks
    return next((callback.overruled for callback in callbacks if isinstance(callback, GaLoreCallback)), "")


def _launch(trainer: Trainer) -> list[str]:
    """The words of ``galore-ft train`` that start as many processes under this backend; none for one process."""
    from galore_trainer.hf.backend import training_backend

    if trainer.args.world_size == 1:
        return []
    plugin: Any = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    backend = {"fsdp": "fsdp2", "deepspeed": f"zero{plugin.zero_stage if plugin else ''}"}.get(
        training_backend(trainer.args)
    )
    words = ["--num-processes", str(trainer.args.world_size)]
    return [*words, "--launch-config", backend] if backend else words


def summary(result: dict[str, Any], output: Path) -> str:
    """What a user sees at the end: scores, times, memory, files."""
    from galore_trainer.run.results.columns import predicted_peak
    from galore_trainer.tables import human_bytes

    seconds = result["seconds"]
    parts = ", ".join(
        f"{name.replace('_', '+')} {seconds[name]:.0f} s ({seconds[name] / max(seconds['training'], 1e-9):.0%})"
        for name in ("forward_backward", "update", "refresh")
    )
    lines = []
    for when in ("before", "after"):
        if result[f"score_{when}"]:
            lines.append(f"{when:<7} {in_words(result[f'score_{when}'])}")
    lines.append(f"time    training {seconds['training']:.0f} s: {parts}; evaluation {seconds['evaluation']:.0f} s")
    state = human_bytes(sum(result["optimizer_state_bytes"].values()))
    peak = result["peak_memory"]["peak_bytes"]
    memory = f"; peak {human_bytes(peak)} {result['peak_memory']['meaning']}" if peak is not None else ""
    if (predicted := predicted_peak(result)) is not None:
        memory += f", predicted {human_bytes(predicted)}"
    lines.append(f"memory  optimizer state {state}{memory}")
    adapter = f" {ADAPTER}/," if METHODS[result["method"]].block == "lora" else ""
    predictions = " predictions.jsonl," if result["config"]["eval"]["generate"] else ""
    files = f"{RESULT}, {LOG},{predictions} losses.jsonl, loss.png, {RESOLVED_CONFIG}"
    lines.append(f"files   {output}: model/,{adapter} {files}")
    lines.append(f"next    galore-ft chat {shlex.quote(str(output))}")
    return "\n".join(lines)
