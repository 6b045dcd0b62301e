"""One run from its configuration to a trained, scored and documented model: ``train(RunConfig) -> RunResult``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galore_trainer.errors import OptionError
from galore_trainer.recipes.base import ALSO
from galore_trainer.run.files import write_file, write_json
from galore_trainer.run.launching.checkpoints import ASIDE, checkpoints, make_way, newest_whole, remove, saved_step
from galore_trainer.run.launching.distributed import (
    check_sharding,
    check_trainer,
    end_with_launcher,
    is_main_process,
    save_whole_model,
    scored_model,
    shards_weights,
)
from galore_trainer.run.launching.preflight import check_room, check_trackers
from galore_trainer.run.launching.start import choose_start, own_folder
from galore_trainer.run.results.publish import Destination, check_publish, publish
from galore_trainer.run.results.result import LOG, RESULT, make_result, seconds, summary, write_artifacts
from galore_trainer.run.scoring.scores import in_words
from galore_trainer.run.settings.arguments import check_method, check_samples, run_arguments, sampled
from galore_trainer.run.settings.methods import ADAPTER, METHODS, resolve
from galore_trainer.run.settings.run_config import RESOLVED_CONFIG, RunConfig
from galore_trainer.run.training.failures import explained

if TYPE_CHECKING:
    from transformers import Trainer

    from galore_trainer.recipes.base import TaskData
    from galore_trainer.run.training.progress import ProgressCallback, Say
    from galore_trainer.run.training.trainers import Rows

MODEL, SCORE_BEFORE = "model", "score_before.json"


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
    output = Path(config.output_dir).expanduser()
    with own_folder(output) if is_main_process() else contextlib.nullcontext():
        ready = prepare(config, resume=resume, overwrite=overwrite)
        with explained(output):
            return _run(config, ready, output, resume=resume, overwrite=overwrite)


def _run(config: RunConfig, ready: PreparedRun, output: Path, *, resume: str | None, overwrite: bool) -> RunResult:
    trainer, arguments, say, main = ready.trainer, ready.trainer.args, ready.say, ready.say.main
    data, model, tokenizer, checkpoint = ready.data, ready.model, ready.tokenizer, ready.checkpoint
    timing, interrupt = ready.timing, ready.interrupt

    from galore_trainer.run.results.figures import parameter_counts
    from galore_trainer.run.results.peak_memory import PeakMemory
    from galore_trainer.run.scoring.evaluate import evaluate_examples

    parameters = parameter_counts(trainer.model)
    say(f"parameters: {parameters['trained']:,} of {parameters['total']:,} are trained")
    if main:  # from here on the run exists
        if overwrite and checkpoint is None:
            _clear(output)
        for note in make_way(output, checkpoint):
            say(note)
        write_file(output / RESOLVED_CONFIG, config.to_yaml())

    def score(weights: str, doing: str, when: str = "") -> dict[str, Any]:
        """Score the model on held-out examples; ``weights`` are the files that it can be read from again."""
        with scored_model(model, arguments, weights, config) as scored, say.counting(doing) as progress:
            return evaluate_examples(
                scored,
                tokenizer,
                data.task,
                data.eval,
                config,
                also=ready.also,
                progress=progress,
                predictions_path=output / f"predictions{when}.jsonl",
                losses_path=output / f"losses{when}.jsonl",
            )

    before, evaluation_seconds = None, 0.0
    if main and config.eval.before and data.eval:
        before = _read_score(output, resume, config)
        if before is None:
            before = score(config.model_name_or_path, "scoring the model before training", "_before")
            write_json(output / SCORE_BEFORE, before)
        evaluation_seconds += before["seconds"]
        say(f"before training: {in_words(before)}")

    # Read now: the checkpoint may be removed while training goes on.
    resumed_from = saved_step(checkpoint) if checkpoint else None
    memory = PeakMemory(arguments.device)
    with interrupt.listening(), ready.progress.showing():
        _train(trainer, checkpoint, say)
    result_path = output / RESULT
    if interrupt.heard():
        newest = newest_whole(output) if main else None
        go_on = f"go on with --resume auto (from {newest or 'the beginning'})"
        if not METHODS[config.method].resumable:
            go_on = "it cannot resume"
        say(f"interrupted at step {trainer.state.global_step}; {go_on}")
        trainer.accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended
        return RunResult(output, result_path, True, {})
    peak = memory.report()
    finish = METHODS[config.method].finish
    with explained(output, MODEL, ADAPTER):
        if finish:
            resolve(finish)(trainer, config, output)
        save_whole_model(trainer, output / MODEL)
    after = None
    if main and data.eval:
        after = score(str(output / MODEL), "scoring the trained model")
        for scored in (after, *after.get("also", {}).values()):
            if not math.isfinite(scored["eval_loss"]):
                raise FloatingPointError(f"the loss of the trained model on held-out examples is {scored['eval_loss']}")
        evaluation_seconds += after["seconds"]
    result: dict[str, Any] = {}
    if main:
        result = make_result(config, trainer, data, before, after, peak, resumed_from)
        result |= {"parameters": parameters, "seconds": seconds(trainer, timing) | {"evaluation": evaluation_seconds}}
        write_artifacts(output, config, trainer, result)
        say(summary(result, output))
        if ready.destination is not None:
            say(f"upload  {publish(ready.destination, output / MODEL)}")
    if hasattr(trainer, "end"):
        trainer.end()
    return RunResult(output, result_path, False, result)


# ------------------------------------------------------------------------------------------ before training


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """What each process of a run has before the first step."""

    trainer: Trainer
    model: Any
    tokenizer: Any
    data: TaskData
    also: dict[str, TaskData]
    checkpoint: Path | None
    timing: Any
    interrupt: Any
    progress: ProgressCallback
    say: Say
    destination: Destination | None


def prepare(config: RunConfig, *, resume: str | None = None, overwrite: bool = False) -> PreparedRun:
    """Check the settings, load data and model, and build the Trainer; changes nothing on disk."""
    from accelerate import PartialState

    from galore_trainer.run.training.progress import Say

    end_with_launcher()
    arguments = run_arguments(config)
    say = Say(arguments.process_index == 0)
    check_method(config, arguments)
    if say.main:
        check_trackers(arguments)
    output = Path(config.output_dir).expanduser()
    checkpoint = choose_start(config, resume, overwrite, say)
    check_sharding(arguments, checkpoint)
    check_samples(config, sharded=shards_weights(arguments))
    destination = check_publish(config) if say.main else None
    PartialState().wait_for_everyone()

    from galore_trainer.optim.guards import some_of
    from galore_trainer.recipes import load_also, load_data
    from galore_trainer.run.models.encoded import encoded
    from galore_trainer.run.models.model import leave_files, load_model
    from galore_trainer.run.models.prompts import stop_at_turns
    from galore_trainer.run.training.finite import not_finite

    data = load_data(config.data)
    check_samples(config, data.eval)
    say(f"data: {len(data.train)} to train on, {len(data.eval)} held out ({data.task} from {config.data.shown_source})")
    also = load_also(config.eval.also, data.train)
    data.notes.extend(f"loss on {note}" for other in also.values() for note in other.notes)
    for note in data.notes:
        say(f"  - {note}")
    for sentence in config.idle_settings(told=True):
        say(f"note: {sentence}")
    model, tokenizer = load_model(config.model_name_or_path, **config.loading)
    if bad := not_finite(model):
        wanted = "a model of finite weights"
        raise OptionError("model_name_or_path", config.model_name_or_path, wanted, f"Not finite: {some_of(bad)}.")
    stop_at_turns(model, tokenizer)
    scored = {"the held-out data": data.eval, **{f"{ALSO}.{name}": other.eval for name, other in also.items()}}
    for place, examples in scored.items():  # refused before training where none that is scored fits into max_length
        if examples:
            try:
                encoded(tokenizer, examples[: config.eval.limit], config.max_length)
            except OptionError as error:
                raise OptionError(error.option, error.got, f"{error.wanted} of {place}", error.way_out) from None
    if not shards_weights(arguments):  # else the backend gives each process its part
        model.to(arguments.device)  # type: ignore[arg-type]
        if arguments.device.type == "cpu":
            leave_files(model)
    trainer, timing, interrupt, progress = _make_trainer(config, arguments, model, tokenizer, data, output, say)
    check_trainer(trainer)
    return PreparedRun(trainer, model, tokenizer, data, also, checkpoint, timing, interrupt, progress, say, destination)


def _clear(output: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for path in [*checkpoints(output), output / ASIDE, output / MODEL, output / ADAPTER]:
        remove(path)
    lines = [f"{what}{when}.jsonl" for what in ("predictions", "losses") for when in ("", "_before")]
    for name in (RESULT, LOG, SCORE_BEFORE, RESOLVED_CONFIG, *lines, "loss.png"):
        (output / name).unlink(missing_ok=True)


def _read_score(output: Path, resume: str | None, config: RunConfig) -> dict[str, Any] | None:
    """The score of the model before training, where a run that is resumed has it for the same data."""
    with contextlib.suppress(OSError, ValueError):
        if resume:
            score = json.loads((output / SCORE_BEFORE).read_text(encoding="utf-8"))
            if score.get("also", {}).keys() == config.eval.also.keys():
                return score
    return None


# ------------------------------------------------------------------------------------------ training


def _make_trainer(
    config: RunConfig, arguments: Any, model: Any, tokenizer: Any, data: TaskData, output: Path, say: Say
) -> tuple[Trainer, Any, Any, ProgressCallback]:
    from transformers import PrinterCallback
    from transformers.trainer_callback import ProgressCallback as TheirProgress

    from galore_trainer.run.models.encoded import encoded
    from galore_trainer.run.models.packing import PackedRows, check_packing
    from galore_trainer.run.training.callbacks import (
        EndCallback,
        InterruptCallback,
        LogCallback,
        ScheduleCallback,
        SealCallback,
        TimingCallback,
    )
    from galore_trainer.run.training.finite import FiniteCallback
    from galore_trainer.run.training.progress import ProgressCallback, on_terminal
    from galore_trainer.run.training.samples import SampleCallback
    from galore_trainer.run.training.trainers import build_trainer

    examples, dropped = encoded(tokenizer, data.train, config.max_length)
    if dropped:
        say(f"  - {len(dropped)} training examples exceed max_length {config.max_length} and were left out")
    if not examples:
        raise OptionError("data.source", config.data.shown_source, "at least one example to train on")
    rows: Rows = examples
    if config.packing and config.trainer == "hf":  # TRL's trainer packs by itself
        check_packing(model)
        rows = PackedRows(examples, config.max_length)
        say(f"  - {len(examples)} examples packed into {len(rows)} rows of at most {config.max_length} tokens")
    held_out = encoded(tokenizer, data.eval, config.max_length).rows if data.eval else None
    prepared, plugin = resolve(METHODS[config.method].prepare)(model, config, arguments)
    if say.main and not shards_weights(arguments):
        check_room(config, arguments, prepared, len(rows), arguments.world_size)
    timing, interrupt, finite = TimingCallback(arguments.device), InterruptCallback(), FiniteCallback()
    limit, arguments.save_total_limit = (
        arguments.save_total_limit,
        None,
    )  # SealCallback rotates checkpoints, not the Trainer
    trainer = build_trainer(config, arguments, prepared, tokenizer, rows, held_out, **plugin)
    for callback_class in (PrinterCallback, TheirProgress):
        trainer.remove_callback(callback_class)
    finite.watch(trainer)
    progress = ProgressCallback(trainer.train_dataset, live=on_terminal() and not config.training.get("disable_tqdm"))
    log = LogCallback(output / LOG)
    if "callbacks" not in plugin:
        trainer.add_callback(ScheduleCallback())
    callbacks: list[Any] = [timing, log, progress, finite, SealCallback(limit, finite), interrupt, EndCallback()]
    if shown := sampled(config, data.eval):  # after finite, which looks at the weights first
        callbacks.insert(4, SampleCallback(model, tokenizer, shown, config, output / LOG, progress, trainer))
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer, timing, interrupt, progress


def _train(trainer: Trainer, checkpoint: Path | None, say: Say) -> None:
    """Train to the end; for a run whose last step is done, load its best model where that is asked for."""
    from galore_trainer.run.training.callbacks import RunIsOver

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RunIsOver:
        say(f"all {trainer.state.global_step} steps are done already: nothing is left to train")
        trainer.is_in_train = False
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
