"""Scoring a model: batched greedy generation, the recipe's exact match or text metrics, the loss on the targets."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from galore_trainer.errors import OptionError
from galore_trainer.metrics.nlg import PER_EXAMPLE
from galore_trainer.run.device import device_type, uses_bf16
from galore_trainer.run.files import check_writable, write_file
from galore_trainer.run.models.generation import Progress, generate, inference
from galore_trainer.run.models.prompts import IGNORED, encode_all, make_collator, render_prompt
from galore_trainer.run.scoring.scores import headline
from galore_trainer.run.settings.arguments import check_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from galore_trainer.recipes.base import Example
    from galore_trainer.run.settings.run_config import RunConfig

LOSS_DIGITS = 6
LOSS_BATCH_SIZE = 8  # as TrainingArguments.per_device_eval_batch_size; logits over a large vocabulary take the memory


def evaluate(
    model_or_run: str,
    config: RunConfig,
    *,
    predictions_path: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Load a model by name and score it on the evaluation part of ``config.data``.

    Args:
        model_or_run: as ``model_name_or_path``; a run's folder means its trained model.
        config: says which data, how many problems, how long answers may be and which precision.
        predictions_path: JSON lines written there, one a problem.
        progress: called with (done, total) problems while generating.

    Returns:
        What ``evaluate_examples`` returns.

    Raises:
        OptionError: predictions that could not be written, found before anything is loaded; a model or data that
            cannot be read.
    """
    from galore_trainer.recipes import load_data
    from galore_trainer.run.models.model import load_model

    if predictions_path is not None:
        check_writable("--predictions", predictions_path)
    data = load_data(config.data)
    device = device_type(use_cpu=bool(config.training.get("use_cpu")))
    check_attention(config, device, sixteen_bits=uses_bf16(config.training.get("bf16"), device))
    model, tokenizer = load_model(model_or_run, **config.loading)
    model.to(device)  # type: ignore[arg-type]
    return evaluate_examples(
        model, tokenizer, data.task, data.eval, config, predictions_path=predictions_path, progress=progress
    )


def evaluate_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    examples: Sequence[Example],
    config: RunConfig,
    *,
    predictions_path: str | Path | None = None,
    losses_path: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a model in memory on the first ``config.eval.limit`` examples; it is left as it was.

    Args:
        predictions_path: JSON lines written there, one a prediction.
        losses_path: JSON lines written there, one an example that is not too long: its ``id``, its mean ``loss`` in
            nats per token and its ``tokens``, for comparisons problem by problem.

    Returns:
        ``task``; all the recipe's ``score`` reports but ``per_example``, ``n`` among it; ``metric``, ``extract``,
        ``score`` and ``interval`` as ``scores.headline`` has them; ``eval_loss`` (mean over target tokens, of the first
        reference where there are several), ``eval_loss_dropped`` (examples longer than ``max_length``, left out of the
        loss), ``seconds``. Without ``config.eval.generate`` no answer is written: of the scores there is ``n`` alone.

    Raises:
        OptionError: nothing to evaluate on.
    """
    from galore_trainer.recipes import score

    examples = examples[: config.eval.limit]
    if not examples:
        raise OptionError("data.eval_samples", config.data.eval_samples, "at least one example to evaluate on")
    start = time.perf_counter()
    bf16 = uses_bf16(config.training.get("bf16"), model.device.type)
    scores: dict[str, Any] = {"n": len(examples)}
    if config.eval.generate:
        prompts = [render_prompt(tokenizer, example.messages, example.id) for example in examples]
        predictions = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=config.eval.max_new_tokens,
            batch_size=config.eval.batch_size,
            bf16=bf16,
            progress=progress,
        )
        scores = score(task, predictions, list(examples))
        verdicts = scores.pop("per_example", [{}] * len(examples))
        if predictions_path is not None:
            lines = []
            for example, prompt, prediction, verdict in zip(examples, prompts, predictions, verdicts, strict=True):
                line = {"id": example.id, "prompt": prompt, "prediction": prediction, "answer": example.answer}
                lines.append({**line, **_verdict(verdict, config.eval.extract)})
            _write_lines(predictions_path, lines)
    rows = encode_all(tokenizer, examples, config.max_length)
    batch_size = config.training.get("per_device_eval_batch_size", LOSS_BATCH_SIZE)
    losses = target_losses(model, tokenizer, rows.rows, batch_size, bf16=bf16)
    if losses_path is not None:
        short = [example.id for example in examples if example.id not in rows.dropped]
        means = [round(loss.total / loss.tokens, LOSS_DIGITS) for loss in losses]
        _write_lines(
            losses_path,
            [
                {"id": name, "loss": mean, "tokens": loss.tokens}
                for name, mean, loss in zip(short, means, losses, strict=True)
            ],
        )
    return {
        "task": task,
        **scores,
        **headline(scores, config.eval.extract),
        "eval_loss": mean_of(losses),
        "eval_loss_dropped": len(rows.dropped),
        "seconds": time.perf_counter() - start,
    }


def _write_lines(path: str | Path, lines: Sequence[dict[str, Any]]) -> None:
    write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _verdict(row: dict[str, Any], extract: str) -> dict[str, Any]:
    """What a predictions file says of one prediction."""
    if extract in row:
        return {"extracted": row[extract], "correct": row[f"{extract}_correct"]}
    return {key: row[key] for key in ("references", *PER_EXAMPLE) if key in row}


def eval_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    *,
    max_length: int = 2**31,
    bf16: bool = False,
) -> float:
    """Cross entropy on targets and end tokens: the mean over tokens, whatever the batches; in nats.

    Examples longer than ``max_length`` tokens are left out, as in training.
    """
    rows = encode_all(tokenizer, examples, max_length).rows
    return mean_of(target_losses(model, tokenizer, rows, batch_size, bf16=bf16))


class TargetLoss(NamedTuple):
    """The cross entropy of one example: its ``total`` in nats, over ``tokens`` of target and end token."""

    total: float
    tokens: int


def mean_of(losses: Sequence[TargetLoss]) -> float:
    """The mean over all tokens, whatever the examples they belong to."""
    return sum(loss.total for loss in losses) / sum(loss.tokens for loss in losses)


def target_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, list[int]]],
    batch_size: int,
    *,
    bf16: bool = False,
) -> list[TargetLoss]:
    """The loss of each row of ``encode_all``, in the order of ``rows``; batches hold rows of like length."""
    import torch

    collate = make_collator(tokenizer)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    losses = [TargetLoss(0.0, 0)] * len(rows)
    with inference(model, bf16):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {name: ids.to(model.device) for name, ids in collate([rows[i] for i in chosen]).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
            by_token = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
            )
            totals = by_token.view(labels.shape).cpu().double().sum(1).tolist()
            for i, total, tokens in zip(chosen, totals, (labels != IGNORED).sum(1).tolist(), strict=True):
                losses[i] = TargetLoss(total, tokens)
    return losses
