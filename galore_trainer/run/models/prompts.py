"""From an example to token ids: what the model reads, what it is trained on, and how examples make a batch.

The text of the prompt fixes its ids (special tokens are written out in it), so training and generation read the same.
Padding is masked by position, never by id: where the padding token is the end token, as in SmolLM2, masking by id
would teach the model not to stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from galore_trainer.errors import OptionError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

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


class Collator:
    """Make a batch of encoded examples: padded on the right, labels there ``-100``.

    Args:
        pad_token_id: any id; the attention mask and the labels tell padding from text.
        pad_to_multiple_of: round the batch's length up to a multiple of this (8 suits GPUs).
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id, self.pad_to_multiple_of = pad_token_id, pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each batch x length, int64."""
        ids = [list(row["input_ids"]) for row in rows]
        labels = [list(row["labels"]) for row in rows]
        multiple = self.pad_to_multiple_of
        return {
            "input_ids": pad(ids, self.pad_token_id, multiple=multiple),
            "attention_mask": pad([[1] * len(row) for row in ids], 0, multiple=multiple),
            "labels": pad(labels, IGNORED, multiple=multiple),
        }


def pad(
    rows: Sequence[Sequence[int]], value: int, *, side: Literal["left", "right"] = "right", multiple: int = 1
) -> torch.Tensor:
    """Rows of different lengths as one int64 tensor, rows x longest, filled with ``value`` on one side."""
    import torch

    width = -(-max(map(len, rows)) // multiple) * multiple
    filled = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        filled[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
    return filled
