"""Generation: greedy continuations of many prompts, and settings that leave a model as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from galore_trainer.run.models.prompts import pad_prompts, token_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]  # (done, total), after every batch


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
    with inference(model, bf16), decoding(model, max_new_tokens, stops, tokenizer.pad_token_id):
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


@contextlib.contextmanager
def inference(model: PreTrainedModel, bf16: bool) -> Iterator[None]:
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
def decoding(
    model: PreTrainedModel, max_new_tokens: int, stops: Sequence[int], pad_id: int, temperature: float = 0.0
) -> Iterator[None]:
    """Replace the model's generation settings, whose sampling options would be merged into ours, for a while.

    Args:
        model: whose ``generate`` reads them.
        max_new_tokens: longest answer.
        stops: ids that end an answer.
        pad_id: of the padding token.
        temperature: of sampling; 0 takes the likeliest token each time.
    """
    from transformers import GenerationConfig

    settings = model.generation_config
    model.generation_config = GenerationConfig(
        **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}),
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


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, and those the model's authors end a turn with."""
    model_ends = getattr(model.generation_config, "eos_token_id", None)
    ends = model_ends if isinstance(model_ends, list) else [] if model_ends is None else [model_ends]
    return [tokenizer.eos_token_id, *(i for i in ends if i != tokenizer.eos_token_id)]
