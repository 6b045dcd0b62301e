"""From an example to token ids: what the model reads, what it is trained on, and how examples make a batch.

The text of the prompt fixes its ids (special tokens are written out in it), so training and generation read the same.
Padding is masked by position, never by id: where the padding token is the end token, as in SmolLM2, masking by id
would teach the model not to stop.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from galore_trainer.errors import OptionError

if TYPE_CHECKING:
    from transformers import BatchEncoding, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

    from galore_trainer.recipes import Example

IGNORED = -100  # the label that torch's cross entropy skips

PLAIN_TURN = {"system": "{}\n\n", "user": "Question: {}\n", "assistant": "Answer: {}\n\n"}


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], name: str = "these turns"
) -> str:
    """Write the turns as the model reads them, up to where the assistant begins to write.

    With a chat template, that template; else ``Question: ...`` and ``Answer:``, after the begin token if the tokenizer
    sets one by itself. Encode the result with ``add_special_tokens=False``.

    Args:
        tokenizer: of the model.
        messages: the turns.
        name: of the example, for errors: its file and line.

    Raises:
        OptionError: the chat template raises, as some do on a system turn or on turns that do not alternate.
    """
    if tokenizer.chat_template:
        turns = [dict(m) for m in messages]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
            if not text:
                raise ValueError("it writes nothing")
            return text
        except Exception as error:  # a template is a program and may raise anything
            raise _template_error(tokenizer, [m["role"] for m in messages], name, error) from error
    begin = tokenizer("")["input_ids"][:1]
    prefix = str(tokenizer.bos_token) if begin and begin[0] == tokenizer.bos_token_id else ""
    return prefix + "".join(PLAIN_TURN[m["role"]].format(m["content"]) for m in messages) + "Answer:"


def _template_error(
    tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], name: str, error: Exception
) -> OptionError:
    number = getattr(error, "lineno", None)  # of a syntax error
    line = f" (its line {number})" if number is not None else ""
    says = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}{line}"
    way_out = "Leave out data.system_prompt and system turns, or use" if "system" in roles else "Use"
    return OptionError(
        "chat_template",
        f"that of {tokenizer.name_or_path or 'the tokenizer'}",
        f"a template that writes {name}, turns of {', '.join(roles)}",
        f"It says {says}. {way_out} a model whose template takes them.",
    )


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> dict[str, Any]:
    """Token ids of prompt, target and end token, with the loss on the last two alone.

    Returns:
        ``input_ids`` and ``labels`` (equal length, never cut) and ``truncated``: True if they exceed ``max_length``.
        Such an example is to be dropped, as ``encode_all`` does: a cut target would teach not to finish, a cut prompt
        would ask another question.
    """
    prompt = token_ids(tokenizer, render_prompt(tokenizer, example.messages, example.id))
    space = "" if tokenizer.chat_template else " "
    target = [*token_ids(tokenizer, space + example.target), tokenizer.eos_token_id]
    return {
        "input_ids": prompt + target,
        "labels": [IGNORED] * len(prompt) + target,
        "truncated": len(prompt) + len(target) > max_length,
    }


class Encoded(NamedTuple):
    """A data set ready for the collator, and the ids of the examples that did not fit."""

    rows: list[dict[str, list[int]]]
    dropped: list[str]


def encode_all(tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], max_length: int) -> Encoded:
    """Encode examples and drop those that exceed ``max_length``.

    Raises:
        OptionError: none fits.
    """
    rows: list[dict[str, list[int]]] = []
    dropped: list[str] = []
    shortest = None
    for example in examples:
        row = encode(tokenizer, example, max_length)
        length = len(row["input_ids"])
        shortest = min(length, shortest or length)
        if row.pop("truncated"):
            dropped.append(example.id)
        else:
            rows.append(row)
    if dropped and not rows:
        raise OptionError("max_length", max_length, f"at least {shortest}, the tokens of the shortest example")
    return Encoded(rows, dropped)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text in which every special token is already written out."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def make_collator(tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int = 1) -> DataCollatorForSeq2Seq:
    """Make the function that turns rows of ``encode_all`` into a batch.

    A batch holds ``input_ids``, ``attention_mask`` and ``labels``, each batch x length, int64. It is padded on the
    right, where labels are ``-100``.

    Args:
        tokenizer: its padding token fills the ids; it is left as it is.
        pad_to_multiple_of: round the length up to a multiple of this (8 suits GPUs).
    """
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(_padding(tokenizer, "right"), pad_to_multiple_of=pad_to_multiple_of)


def pad_prompts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> BatchEncoding:
    """``input_ids`` and ``attention_mask`` of prompts to be continued, rows x longest, int64, padded on the left."""
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(_padding(tokenizer, "left"))([{"input_ids": list(row)} for row in rows])  # type: ignore[return-value]


def _padding(tokenizer: PreTrainedTokenizerBase, side: Literal["left", "right"]) -> PreTrainedTokenizerBase:
    """A copy that pads on a side and makes a mask: the settings of the tokenizer itself are saved with the model."""
    padding = copy.copy(tokenizer)
    padding.padding_side, padding.model_input_names = side, ["input_ids", "attention_mask"]
    return padding
