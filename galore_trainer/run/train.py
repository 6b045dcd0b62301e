"""One run from its configuration to a trained, scored and documented model: ``train(RunConfig) -> RunResult``."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galore_trainer.errors import OptionError
from galore_trainer.run.arguments import training_arguments
from galore_trainer.run.artifacts import environment, plot_losses, write_file, write_json
from galore_trainer.run.checkpoints import checkpoints, damage
from galore_trainer.run.config import RESOLVED_CONFIG, RunConfig
from galore_trainer.run.distributed import (
    check_sharding,
    check_trainer,
    cuts_weights,
    save_whole_model,
    scored_model,
    shards_state,
    wait_for_all,
)
from galore_trainer.run.methods import ADAPTER, METHODS, check_method
from galore_trainer.run.publish import Destination, check_publish, publish
from galore_trainer.run.scores import in_words
from galore_trainer.run.start import choose_start

if TYPE_CHECKING:
    from transformers import Trainer

    from galore_trainer.recipes.base import TaskData

RESULT, LOG, SCORE_BEFORE = "result.json", "log.jsonl", "score_before.json"
RUN_DEFAULTS: dict[str, Any] = {"report_to": "none", "logging_steps": 10, "save_total_limit": 2, "save_steps": 100}
"""TrainingArguments fields a run sets below the user's own."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Where a run left its files, and whether it got to the end.

    Attributes:
        output_dir: the run's folder.
        result_path: its ``result.json``; not written by an interrupted run.
        interrupted: stopped by Ctrl-C after saving a checkpoint.
        result: the content of ``result.json``; empty if interrupted.
    """

    output_dir: Path
    result_path: Path
    interrupted: bool
    result: dict[str, Any]


def train(config: RunConfig, *, resume: str | None = None, overwrite: bool = False) -> RunResult:
    """Fine-tune, score before and after, and write everything under ``config.output_dir``.

    Args:
        config: the run.
        resume: ``auto`` or a checkpoint's folder; None starts a new run.
        overwrite: remove an earlier run in the same folder.

    Raises:
        OptionError: a setting that cannot be honoured; nothing was changed on disk.
        RuntimeError: training failed, or the disk is full; the last whole checkpoint is named.
    """
    ready = prepare(config, resume=resume, overwrite=overwrite)
    trainer, arguments, say, main = ready.trainer, ready.trainer.args, ready.say, ready.say.main
    data, model, tokenizer, checkpoint = ready.data, ready.model, ready.tokenizer, ready.checkpoint
    timing, interrupt = ready.timing, ready.interrupt
    output = Path(config.output_dir).expanduser()

    from galore_trainer.run.evaluate import evaluate_examples
    from galore_trainer.run.figures import parameter_counts
    from galore_trainer.run.memory import PeakMemory

    parameters = parameter_counts(trainer.model)
    say(f"parameters: {parameters['trained']:,} of {parameters['total']:,} are trained")
    if main:  # from here on the run exists
        _clear(output) if overwrite and checkpoint is None else None
        write_file(output / RESOLVED_CONFIG, config.to_yaml())

    before, evaluation_seconds = None, 0.0
    if main and config.eval.before and data.eval:
        before = _read_score(output, resume)
        if before is None:
            with scored_model(model, arguments, config.model_name_or_path, config.dtype) as scored:
                before = evaluate_examples(
                    scored, tokenizer, data.task, data.eval, config,
                    predictions_path=output / "predictions_before.jsonl",
                    progress=say.progress("scoring the model before training"),
                )  # fmt: skip
            write_json(output / SCORE_BEFORE, before)
        evaluation_seconds += before["seconds"]
        say(f"before training: {in_words(before)}")

    memory = PeakMemory(arguments.device)
    with interrupt.listening(), _disk_guard(output):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    result_path = output / RESULT
    if interrupt.heard():
        newest = next((c for c in checkpoints(output) if damage(c) is None), None)
        go_on = f"go on with --resume auto (from {newest})" if METHODS[config.method].resumable else "it cannot resume"
        say(f"interrupted at step {trainer.state.global_step}; {go_on}")
        return RunResult(output, result_path, True, {})
    peak = memory.report()
    finish = METHODS[config.method].finish
    with _disk_guard(output):
        finish(trainer, config, output) if finish else None
        save_whole_model(trainer, output / "model")
    after = None
    if main and data.eval:
        with scored_model(model, arguments, str(output / "model"), config.dtype) as scored:
            after = evaluate_examples(
                scored, tokenizer, data.task, data.eval, config, predictions_path=output / "predictions.jsonl",
                progress=say.progress("scoring the trained model"),
            )  # fmt: skip
        evaluation_seconds += after["seconds"]
    result: dict[str, Any] = {}
    if main:
        result = _result(config, trainer, data, before, after, peak, checkpoint)
        result |= {"parameters": parameters, "seconds": _seconds(trainer, timing) | {"evaluation": evaluation_seconds}}
        _write_artifacts(output, config, trainer, result)
        say(_summary(result, output))
        if ready.destination is not None:
            say(f"upload  {publish(ready.destination, output / 'model')}")
    trainer.end() if hasattr(trainer, "end") else None
    return RunResult(output, result_path, False, result)


# ------------------------------------------------------------------------------------------ before training


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a process of a run has before the first step."""

    trainer: Trainer
    model: Any
    tokenizer: Any
    data: TaskData
    checkpoint: Path | None
    timing: Any
    interrupt: Any
    say: _Say
    destination: Destination | None


def prepare(config: RunConfig, *, resume: str | None = None, overwrite: bool = False) -> Prepared:
    """Check what ``train`` was asked for, load data and model, make the Trainer; changes nothing on disk."""
    arguments = training_arguments(config, **{**RUN_DEFAULTS, "disable_tqdm": not sys.stderr.isatty()})
    say = _Say(arguments.process_index == 0)
    check_method(config, arguments)
    output = Path(config.output_dir).expanduser()
    checkpoint = choose_start(config, resume, overwrite, say)
    check_sharding(arguments, checkpoint)
    destination = check_publish(config) if say.main else None
    wait_for_all()

    from transformers.utils.logging import disable_progress_bar

    from galore_trainer.recipes import load_data
    from galore_trainer.run.model import leave_files, load_model

    data = load_data(config.data)
    say(f"data: {len(data.train)} to train on, {len(data.eval)} held out ({data.task} from {config.data.source})")
    for note in data.notes:
        say(f"  - {note}")
    if arguments.disable_tqdm:
        disable_progress_bar()
    model, tokenizer = load_model(config.model_name_or_path, dtype=config.dtype)
    if not cuts_weights(arguments):  # else each process gets its part from the backend
        model.to(arguments.device)  # type: ignore[arg-type]
        if arguments.device.type == "cpu":
            leave_files(model)
    trainer, timing, interrupt = _make_trainer(config, arguments, model, tokenizer, data, output, say)
    check_trainer(trainer)
    return Prepared(trainer, model, tokenizer, data, checkpoint, timing, interrupt, say, destination)


def _clear(output: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for path in [*checkpoints(output), output / "model", output / ADAPTER]:
        shutil.rmtree(path, ignore_errors=True)
    names = (RESULT, LOG, SCORE_BEFORE, RESOLVED_CONFIG, "predictions.jsonl", "predictions_before.jsonl", "loss.png")
    for name in names:
        (output / name).unlink(missing_ok=True)


def _read_score(output: Path, resume: str | None) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        if resume:
            return json.loads((output / SCORE_BEFORE).read_text(encoding="utf-8"))
    return None


# ------------------------------------------------------------------------------------------ training


def _make_trainer(
    config: RunConfig, arguments: Any, model: Any, tokenizer: Any, data: TaskData, output: Path, say: _Say
) -> tuple[Trainer, Any, Any]:
    from transformers import PrinterCallback

    from galore_trainer.run.callbacks import InterruptCallback, LogCallback, SealCallback, TimingCallback
    from galore_trainer.run.prompts import encode_all
    from galore_trainer.run.trainers import build_trainer

    rows, dropped = encode_all(tokenizer, data.train, config.max_length)
    if dropped:
        say(f"  - {len(dropped)} training examples exceed max_length {config.max_length} and were left out")
    if not rows:
        raise OptionError("data.source", config.data.source, "at least one example to train on")
    held_out = encode_all(tokenizer, data.eval, config.max_length).rows if data.eval else None
    model, plugin = METHODS[config.method].prepare(model, config, arguments)
    timing, interrupt = TimingCallback(arguments.device), InterruptCallback()
    trainer = build_trainer(config, arguments, model, tokenizer, rows, held_out, **plugin)
    trainer.remove_callback(PrinterCallback)
    for callback in (timing, SealCallback(), interrupt, LogCallback(output / LOG, bool(arguments.disable_tqdm))):
        trainer.add_callback(callback)
    return trainer, timing, interrupt


@contextlib.contextmanager
def _disk_guard(output: Path) -> Iterator[None]:
    """Turn a full disk into one clear word, after removing the checkpoint that could not be finished."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not full and not ("PytorchStreamWriter" in str(error) and shutil.disk_usage(output).free < 1 << 20):
            raise
        good = None
        for path in checkpoints(output):
            if damage(path) is None:
                good = good or path
            else:
                shutil.rmtree(path, ignore_errors=True)
        kept = f"{good.name} is whole: free some space, then --resume auto" if good else "no checkpoint was whole yet"
        raise RuntimeError(
            f"the disk is full: the newest checkpoint could not be written and was removed; {kept}"
        ) from error


# ------------------------------------------------------------------------------------------ afterwards


def _seconds(trainer: Trainer, timing: Any) -> dict[str, float]:
    """Seconds of training by part, without those of diagnosis, which is no part of the method."""
    from galore_trainer.run.figures import optimizer_seconds

    mine = timing.stopwatch.seconds()
    parts = ("diagnosis", "refresh", "update", "plain")
    diagnosis, refresh, *updates = (optimizer_seconds(trainer.optimizer, part) for part in parts)
    step = mine.get("step", 0.0) - diagnosis
    # DeepSpeed takes its step inside the backward pass, where the Trainer's callbacks do not see it.
    optimizer = max(mine.get("optimizer", 0.0) - diagnosis, refresh + sum(updates))
    return {"training": step, "forward_backward": step - optimizer, "refresh": refresh, "update": optimizer - refresh}


def _result(
    config: RunConfig, trainer: Trainer, data: TaskData, before: Any, after: Any, peak: dict[str, Any],
    checkpoint: Path | None,
) -> dict[str, Any]:  # fmt: skip
    from galore_trainer.hf.backend import training_backend
    from galore_trainer.run.estimate import predict
    from galore_trainer.run.figures import optimizer_figures

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
        "resumed_from_step": int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else None,
        "train_examples": len(data.train),
        "score_before": before,
        "score_after": after,
        "train_loss": next((row["loss"] for row in reversed(history) if "loss" in row), None),
        "peak_memory": peak,
        "predicted_memory": uncounted
        if shards_state(trainer.args)
        else predict(config, trainer.train_dataset, trainer.args.world_size),
        "environment": environment(),
        "data_notes": data.notes,
        "config": config.to_dict(),
        **optimizer_figures(trainer.optimizer),
    }


def _write_artifacts(output: Path, config: RunConfig, trainer: Trainer, result: dict[str, Any]) -> None:
    from galore_trainer.run.card import model_card

    gap = config.galore.update_proj_gap
    projects = METHODS[config.method].block == "galore"
    refreshes = range(1, result["steps"] + 1, gap) if projects and result["steps"] / gap <= 50 else ()
    plot_losses(output / "loss.png", trainer.state.log_history, refresh_steps=list(refreshes))
    card = model_card(
        config, before=result["score_before"], after=result["score_after"], environment=result["environment"]
    )
    write_file(output / "model" / "README.md", card)
    write_json(output / RESULT, result)


def _summary(result: dict[str, Any], output: Path) -> str:
    from galore_trainer.hf.table import human_bytes
    from galore_trainer.run.columns import predicted_peak

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
    told = f"; peak {human_bytes(peak)} {result['peak_memory']['meaning']}" if peak is not None else ""
    if (predicted := predicted_peak(result)) is not None:
        told += f", predicted {human_bytes(predicted)}"
    lines.append(f"memory  optimizer state {state}{told}")
    adapter = f" {ADAPTER}/," if METHODS[result["method"]].block == "lora" else ""
    lines.append(f"files   {output}: model/,{adapter} {RESULT}, {LOG}, predictions.jsonl, loss.png, {RESOLVED_CONFIG}")
    return "\n".join(lines)


class _Say:
    """Prints on the main process alone."""

    def __init__(self, main: bool) -> None:
        self.main = main

    def __call__(self, text: str) -> None:
        if self.main:
            print(text, flush=True)

    def progress(self, what: str) -> Any:
        """A ``(done, total)`` callback: one rewritten line on a terminal, at most one line in ten seconds elsewhere."""
        last = [time.perf_counter()]

        def show(done: int, total: int) -> None:
            if not self.main:
                return
            if sys.stderr.isatty():
                print(f"\r{what}: {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
            elif time.perf_counter() - last[0] > 10 or done == total:
                last[0] = time.perf_counter()
                print(f"{what}: {done}/{total}", flush=True)

        return show
