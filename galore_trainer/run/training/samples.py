"""``eval.samples``: held-out prompts that the model answers now and then while it is trained."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from accelerate import PartialState
from transformers import TrainerCallback

from galore_trainer.run.device import uses_bf16
from galore_trainer.run.models.generation import generate
from galore_trainer.run.models.prompts import render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from galore_trainer.recipes.base import Example
    from galore_trainer.run.settings.run_config import RunConfig
    from galore_trainer.run.training.progress import ProgressCallback

WIDTH = 160  # characters of a prompt or a text that are printed; log.jsonl has all of it


class SampleCallback(TrainerCallback):
    """Answers the first held-out prompts greedily, before the first step, at due steps and after the last one.

    Due is every ``eval.samples_steps``-th step. Unset, it is every step at which the Trainer evaluates; under
    ``eval_strategy: no``, every step at which it saves.

    The answers go to the terminal, to ``log.jsonl`` as rows with ``samples``, and to TensorBoard and W&B, which show
    texts. Training is the same with and without it, bit for bit.

    Args:
        model: that is trained; whole on every process.
        tokenizer: of the model.
        examples: as many as ``eval.samples``.
        config: of the run.
        log: file that rows are appended to.
        progress: prints beside the bar.
        trainer: whose trackers get the texts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        config: RunConfig,
        log: Path,
        progress: ProgressCallback,
        trainer: Trainer,
    ) -> None:
        self._model, self._tokenizer, self._examples = model, tokenizer, examples
        self._settings, self._log, self._progress = config.eval, log, progress
        self._trackers = trainer.callback_handler.callbacks
        self._bf16 = uses_bf16(config.training.get("bf16"), trainer.args.device.type)
        self._prompts = [render_prompt(tokenizer, example.messages, example.id) for example in examples]
        self._last: int | None = None  # step of the newest samples

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the model answers before training; a resumed run goes on with the due steps."""
        if state.global_step == 0:
            self._sample(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A due step, or the last one; trackers close before ``on_train_end``."""
        if self._is_due(args, state, control) or state.global_step >= state.max_steps:
            self._sample(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluations and checkpoints of whole epochs."""
        if not self._settings.samples_steps and self._is_due(args, state, control):
            self._sample(state)

    def _is_due(self, args: Any, state: Any, control: Any) -> bool:
        if self._settings.samples_steps:
            return state.global_step % self._settings.samples_steps == 0
        return control.should_save if args.eval_strategy == "no" else control.should_evaluate

    def _sample(self, state: Any) -> None:
        if state.global_step == self._last:
            return
        self._last = state.global_step
        if state.is_world_process_zero:
            with unchanged_generators(self._model.device):
                texts = generate(
                    self._model,
                    self._tokenizer,
                    self._prompts,
                    max_new_tokens=self._settings.max_new_tokens,
                    batch_size=self._settings.batch_size,
                    bf16=self._bf16,
                )
            rows = [
                {"id": example.id, "prompt": prompt, "prediction": text, "target": example.target}
                for example, prompt, text in zip(self._examples, self._prompts, texts, strict=True)
            ]
            self._report(state.global_step, rows)
        PartialState().wait_for_everyone()
        self._progress.pace.resume()

    def _report(self, step: int, rows: Sequence[dict[str, str]]) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "samples": rows}, ensure_ascii=False) + "\n")
        for example, row in zip(self._examples, rows, strict=True):
            question = _one_line(example.messages[-1]["content"])
            self._progress.tell(f"step {step}  {row['id']}: {question}\n  -> {_one_line(row['prediction'])}")
        for tracker in self._trackers:
            if writer := getattr(tracker, "tb_writer", None):  # TensorBoard
                for row in rows:
                    text = "\n\n".join(f"**{name}**\n\n{_as_code(row[name])}" for name in ("prompt", "prediction"))
                    writer.add_text(f"samples/{row['id']}", text, step)
            if wandb := getattr(tracker, "_wandb", None):
                table = wandb.Table(columns=["step", *rows[0]], data=[[step, *row.values()] for row in rows])
                wandb.log({"samples": table, "train/global_step": step})


@contextlib.contextmanager
def unchanged_generators(device: torch.device) -> Iterator[None]:
    """Give the generators of random numbers, those of GPUs too, the state back that they had."""
    several = device.type in ("cuda", "xpu")  # torch keeps a state for each device of these kinds
    ours, numpys = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if several else [], device_type=device.type if several else "cuda"):
            yield
    finally:
        random.setstate(ours)
        numpy.random.set_state(numpys)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."


def _as_code(text: str) -> str:
    """Markdown that shows a text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())
