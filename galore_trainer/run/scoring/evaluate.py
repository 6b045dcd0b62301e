"""Scoring a model: batched greedy generation, the recipe's exact match or text metrics, the loss on the targets."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from galore_trainer.errors import OptionError
from galore_trainer.metrics.nlg import PER_EXAMPLE
from galore_trainer.run.device import device_type, uses_bf16
from galore_trainer.run.files import check_writable, write_file
from galore_trainer.run.models.encoded import encoded
from galore_trainer.run.models.generation import Progress, generate, inference
from galore_trainer.run.models.prompts import IGNORED, encode_all, make_collator, render_prompt
from galore_trainer.run.scoring.scores import headline
from galore_trainer.run.settings.arguments import check_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from galore_trainer.recipes.base import Example, TaskData
    from galore_trainer.run.models.prompts import Encoded
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
    """Load a model by name and score it on the evaluation part of ``config.data``, and by loss on ``eval.also``.

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
    from galore_trainer.recipes import load_also, load_data
    from galore_trainer.run.models.model import load_model

    if predictions_path is not None:
        check_writable("--predictions", predictions_path)
    data = load_data(config.data)
    also = load_also(config.eval.also, data.train)
    device = device_type(use_cpu=bool(config.training.get("use_cpu")))
    check_attention(config, device, sixteen_bits=uses_bf16(config.training.get("bf16"), device))
    model, tokenizer = load_model(model_or_run, **config.loading)
    model.to(device)  # type: ignore[arg-type]
    return evaluate_examples(
        model, tokenizer, data.task, data.eval, config, also=also, predictions_path=predictions_path, progress=progress
    )


def evaluate_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    examples: Sequence[Example],
    config: RunConfig,
    *,
    also: Mapping[str, TaskData] | None = None,
    predictions_path: str | Path | None = None,
    losses_path: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a model in memory on the first ``config.eval.limit`` examples; it is left as it was.

    Args:
        also: other data by name, of which the same number of examples is scored by loss.
        predictions_path: JSON lines written there, one a prediction.
        losses_path: JSON lines written there, one an example that is not too long, or a piece of a raw text: its
            ``id``, its mean ``loss`` in nats per token and its ``tokens``, for comparisons problem by problem.

    Returns:
        ``task``; all the recipe's ``score`` reports but ``per_example``, ``n`` among it; ``metric``, ``extract``,
        ``score`` and ``interval`` as ``scores.headline`` has them; ``eval_loss`` (mean over the tokens that would be
        trained on, of the first reference where there are several), ``eval_loss_dropped`` (examples longer than
        ``max_length``, left out of the loss), ``seconds``; ``also`` where there is other data: for each name ``task``,
        ``n``, ``eval_loss`` and ``eval_loss_dropped``. Without ``config.eval.generate`` no answer is written: of
        the scores there is ``n`` alone.

    Raises:
        OptionError: nothing to evaluate on.
    """
    from galore_trainer.recipes import score

    examples = examples[: config.eval.limit]
    if not examples:
        raise OptionError("data.eval_samples", config.data.eval_samples, "at least one example to evaluate on")
    start = time.perf_counter()
    bf16 = uses_bf16(config.training.get("bf16"), model.device.type)
    batch_size = config.training.get("per_device_eval_batch_size", LOSS_BATCH_SIZE)

    def losses_on(part: Sequence[Example]) -> tuple[Encoded, list[TargetLoss]]:
        rows = encoded(tokenizer, part, config.max_length)
        return rows, target_losses(model, tokenizer, rows.rows, batch_size, bf16=bf16)

    scores: dict[str, Any] = {"n": len(examples)}
    if config.eval.generate:
        asked = [i for i, example in enumerate(examples) if example.messages]  # the others are raw texts
        prompts = {i: render_prompt(tokenizer, examples[i].messages, examples[i].id) for i in asked}
        texts = generate(
            model,
            tokenizer,
            [*prompts.values()],
            max_new_tokens=config.eval.max_new_tokens,
            batch_size=config.eval.batch_size,
            bf16=bf16,
            progress=progress,
        )
        answers = dict(zip(asked, texts, strict=True))
        scores = score(task, [answers.get(i, "") for i in range(len(examples))], list(examples))
        verdicts = scores.pop("per_example", [{}] * len(examples))
        if predictions_path is not None:
            lines = []
            for i in asked:
                example = examples[i]
                line = {"id": example.id, "prompt": prompts[i], "prediction": answers[i], "answer": example.answer}
                lines.append({**line, **_verdict(verdicts[i], config.eval.extract)})
            _write_lines(predictions_path, lines)
    rows, losses = losses_on(examples)
    if losses_path is not None:
        short = [example.id for example in examples if example.id not in rows.dropped]
        if len(short) < len(losses):  # long raw texts are cut into pieces
            kept = (example for example in examples if example.id not in rows.dropped)
            short = [e.id for e in kept for _ in encode_all(tokenizer, [e], config.max_length).rows]
        means = [round(loss.total / loss.tokens, LOSS_DIGITS) for loss in losses]
        _write_lines(
            losses_path,
            [
                {"id": name, "loss": mean, "tokens": loss.tokens}
                for name, mean, loss in zip(short, means, losses, strict=True)
            ],
        )
    others = {}
    for name, data in (also or {}).items():
        part = data.eval[: config.eval.limit]
        others[name] = {"task": data.task, "n": len(part), **_loss_figures(*losses_on(part))}
    return {
        "task": task,
        **scores,
        **headline(scores, config.eval.extract),
        **_loss_figures(rows, losses),
        **({"also": others} if others else {}),
        "seconds": time.perf_counter() - start,
    }


def _loss_figures(rows: Encoded, losses: Sequence[TargetLoss]) -> dict[str, Any]:
    return {"eval_loss": mean_of(losses), "eval_loss_dropped": len(rows.dropped)}


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
