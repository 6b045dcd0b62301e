"""Scoring a model: batched greedy generation, the recipe's exact match or text metrics, the loss on the targets."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galore_trainer.errors import OptionError
from galore_trainer.run.device import device_type, uses_bf16
from galore_trainer.run.files import check_writable, write_file
from galore_trainer.run.models.encoded import encoded
from galore_trainer.run.models.prompts import (
    IGNORED,
    encode_all,
    make_collator,
    pad_prompts,
    render_prompt,
    stop_ids,
    token_ids,
)
from galore_trainer.run.scoring.scores import headline

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from galore_trainer.recipes.base import Example
    from galore_trainer.run.settings.run_config import RunConfig

Progress = Callable[[int, int], None]  # (done, total), after every batch

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
    model, tokenizer = load_model(model_or_run, dtype=config.dtype)
    model.to(device_type(use_cpu=bool(config.training.get("use_cpu"))))  # type: ignore[arg-type]
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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a model in memory on the first ``config.eval.limit`` examples; it is left as it was.

    Returns:
        ``task``; all the recipe's ``score`` reports but ``per_example``, ``n`` among it; ``metric``, ``extract``,
        ``score`` and ``interval`` as ``scores.headline`` has them; ``eval_loss`` (mean over the tokens that would be
        trained on, of the first reference where there are several), ``eval_loss_dropped`` (examples longer than
        ``max_length``, left out of the loss), ``seconds``.

    Raises:
        OptionError: nothing to evaluate on.
    """
    from galore_trainer.recipes import score

    examples = examples[: config.eval.limit]
    if not examples:
        raise OptionError("data.eval_samples", config.data.eval_samples, "at least one example to evaluate on")
    start = time.perf_counter()
    bf16 = uses_bf16(config.training.get("bf16"), model.device.type)
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
    rows = encoded(tokenizer, examples, config.max_length)
    loss = mean_loss(
        model, tokenizer, rows.rows, config.training.get("per_device_eval_batch_size", LOSS_BATCH_SIZE), bf16=bf16
    )
    extract = config.eval.extract
    if predictions_path is not None:
        lines = []
        for i in asked:
            line = {"id": examples[i].id, "prompt": prompts[i], "prediction": answers[i], "answer": examples[i].answer}
            lines.append(json.dumps({**line, **_verdict(verdicts[i], extract)}, ensure_ascii=False) + "\n")
        write_file(predictions_path, "".join(lines))
    return {
        "task": task,
        **scores,
        **headline(scores, extract),
        "eval_loss": loss,
        "eval_loss_dropped": len(rows.dropped),
        "seconds": time.perf_counter() - start,
    }


def _verdict(row: dict[str, Any], extract: str) -> dict[str, Any]:
    """What a predictions file says of one prediction."""
    if extract in row:
        return {"extracted": row[extract], "correct": row[f"{extract}_correct"]}
    return {key: row[key] for key in ("references", "rouge_l", "cider") if key in row}


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    bf16: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Continue each prompt greedily, up to an end token or ``max_new_tokens``.

    The model's own sampling settings are set aside; its mode, its settings and the tokenizer are left as they were.

    Args:
        prompts: as ``render_prompt`` writes them.
        batch_size: prompts at a time; the longest go first, so that a batch too large for the memory fails at once.
        bf16: compute in bfloat16 (autocast) whatever the weights are.
        progress: called with (done, total) after every batch.

    Returns:
        The new text alone, in the order of ``prompts``, without special tokens and surrounding blanks.
    """
    ids = [token_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    stops = stop_ids(model, tokenizer)
    texts = [""] * len(ids)
    with _inference(model, bf16), _greedy(model, max_new_tokens, stops, tokenizer.pad_token_id):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = pad_prompts(tokenizer, [ids[i] for i in chosen]).to(model.device)
            output: torch.Tensor = model.generate(**batch)  # type: ignore[operator]
            for i, row in zip(chosen, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                length = next((k for k, token in enumerate(row) if token in stops), len(row))
                texts[i] = str(tokenizer.decode(row[:length], skip_special_tokens=True)).strip()
            if progress is not None:
                progress(start + len(chosen), len(order))
    return texts


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
    return mean_loss(model, tokenizer, encode_all(tokenizer, examples, max_length).rows, batch_size, bf16=bf16)


def mean_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, list[int]]],
    batch_size: int,
    *,
    bf16: bool = False,
) -> float:
    """``eval_loss`` of examples that are encoded already."""
    collate = make_collator(tokenizer)
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
    total, tokens = 0.0, 0
    with _inference(model, bf16):
        for start in range(0, len(rows), batch_size):
            batch = {name: ids.to(model.device) for name, ids in collate(rows[start : start + batch_size]).items()}
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**batch, use_cache=False).loss) * count
            tokens += count
    return total / tokens


@contextlib.contextmanager
def _inference(model: PreTrainedModel, bf16: bool) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    import torch

    modes = [(module, module.training) for module in model.modules()]  # frozen parts may differ from the rest
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _greedy(model: PreTrainedModel, max_new_tokens: int, stops: Sequence[int], pad_id: int) -> Iterator[None]:
    """Replace the model's generation settings, whose sampling options would be merged into ours, for a while."""
    from transformers import GenerationConfig

    settings = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops),
        pad_token_id=pad_id,
        use_cache=True,
    )
    try:
        yield
    finally:
        model.generation_config = settings
