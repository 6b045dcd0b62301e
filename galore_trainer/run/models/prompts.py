"""From an example to token ids: what the model reads, what it is trained on, and how examples make a batch.

The text of the prompt fixes its ids (special tokens are written out in it), so training and generation read the same.
Padding is masked by position, never by id: where the padding token is the end token, as in SmolLM2, masking by id
would teach the model not to stop.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from galore_trainer.errors import OptionError
from galore_trainer.recipes.base import Example
from galore_trainer.run.models.turns import (
    Part,
    begin_text,
    marks_answers,
    parts,
    render_prompt,
    template_error,
    whole_chat,
)

if TYPE_CHECKING:
    from transformers import BatchEncoding, DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["encode", "encode_all", "make_collator", "pad_prompts", "render_prompt", "stop_ids", "token_ids"]

IGNORED = -100  # the label that torch's cross entropy skips


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> dict[str, Any]:
    """Token ids of a conversation, with the loss on the answers that are trained on and on what ends each of them.

    What the assistant's turns are, the chat template says: by its ``{% generation %}`` marks, or by what it adds to the
    prompt of each turn. Where it ends the last turn with no special token, the end token ends it. Of a raw text the
    loss is on every token.

    Returns:
        ``input_ids`` and ``labels`` (equal length, never cut) and ``truncated``: True if they exceed ``max_length``.
        Such a conversation is to be dropped, as ``encode_all`` does: a cut answer would teach not to finish, a cut
        prompt would ask another question.

    Raises:
        OptionError: a chat template that raises, or under which the tokens of an earlier turn cannot be told.
    """
    if not example.messages:
        ids, labels = _text_ids(tokenizer, example)
    elif marks_answers(tokenizer):
        ids, labels = _marked(tokenizer, example)
    else:
        ids, labels = _joined(tokenizer, parts(tokenizer, example))
    if not ids or not ends_turns(tokenizer, ids[-1]):
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    return {"input_ids": ids, "labels": labels, "truncated": bool(example.messages) and len(ids) > max_length}


def ends_turns(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token is a special one, with which generation can stop."""
    return token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, those the model's authors end a turn with, and the one its chat template does."""
    model_ends = getattr(model.generation_config, "eos_token_id", None)
    ends = model_ends if isinstance(model_ends, list) else [] if model_ends is None else [model_ends]
    asked = ({"role": "user", "content": "Hi."},)
    with contextlib.suppress(OptionError):  # a template may want turns of other roles
        row = encode(tokenizer, Example(messages=asked, target="Hi.", answer=None, id="a turn"), 1)
        ends = [*ends, row["input_ids"][-1]]
    return list(dict.fromkeys([tokenizer.eos_token_id, *ends]))


def stop_at_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation with this model, once it is saved too, stop where its chat template ends a turn."""
    settings, stops = model.generation_config, stop_ids(model, tokenizer)
    known = getattr(settings, "eos_token_id", None)
    if settings is not None and not {*stops[1:]} <= {*(known if isinstance(known, list) else [known])}:
        settings.eos_token_id = stops


class Encoded(NamedTuple):
    """A data set ready for the collator, and the ids of the examples that did not fit."""

    rows: Sequence[dict[str, list[int]]]
    dropped: list[str]


def encode_all(tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], max_length: int) -> Encoded:
    """Encode examples, drop conversations that exceed ``max_length``, and cut raw texts into pieces of that length.

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
        elif length > max_length:  # each piece begins with the last token of the one before, as that is no target there
            starts = range(0, length - 1, max_length - 1)
            rows += [{key: ids[start : start + max_length] for key, ids in row.items()} for start in starts]
        else:
            rows.append(row)
    if dropped and not rows:
        raise OptionError("max_length", max_length, f"at least {shortest}, the tokens of the shortest example")
    return Encoded(rows, dropped)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text in which every special token is already written out."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _text_ids(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    ids = token_ids(tokenizer, begin_text(tokenizer) + example.target)
    return ids, list(ids)


def _joined(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Part]) -> tuple[list[int], list[int]]:
    """Ids and labels of a text in parts: encoded as a whole as far as no token lies in two parts, else part by part."""
    ids: list[int] = []
    labels: list[int] = []
    count = len(pieces)
    while count > 1 and (whole := _as_a_whole(tokenizer, pieces[:count])) is None:
        count -= 1
        tail = token_ids(tokenizer, pieces[count].text)
        ids, labels = tail + ids, (tail if pieces[count].trained else [IGNORED] * len(tail)) + labels
    if count > 1 and whole is not None:
        return whole[0] + ids, whole[1] + labels
    head = token_ids(tokenizer, pieces[0].text)
    return head + ids, (head if pieces[0].trained else [IGNORED] * len(head)) + labels


def _as_a_whole(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Part]) -> tuple[list[int], list[int]] | None:
    """Ids and labels of the parts as one text; None where a token lies in two parts or the last part changes others.

    A special token may swallow blanks after it; it belongs to the part that it begins in.
    """
    if not tokenizer.is_fast:
        return None
    encoded = tokenizer("".join(piece.text for piece in pieces), add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    ends = list(itertools.accumulate(len(piece.text) for piece in pieces))
    labels, piece, before_last = [], 0, 0
    for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True):
        while piece < len(pieces) - 1 and start >= ends[piece]:
            piece += 1
        if end > ends[piece] and not ends_turns(tokenizer, token):
            return None
        before_last += piece < len(pieces) - 1
        labels.append(token if pieces[piece].trained else IGNORED)
    as_read = token_ids(tokenizer, "".join(piece.text for piece in pieces[:-1]))  # when the last part is generated
    return (ids, labels) if ids[:before_last] == as_read else None


def _marked(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """Ids and labels by the marks of the chat template, up to the end of the last answer."""
    turns = whole_chat(example)
    settings: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    try:
        encoded: Any = tokenizer.apply_chat_template(turns, **settings)
    except Exception as error:  # a template is a program and may raise anything
        raise template_error(tokenizer, [turn["role"] for turn in turns], example.id, error) from error
    ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    runs = [
        [i for i, _ in run] for marked, run in itertools.groupby(enumerate(mask), key=lambda pair: pair[1]) if marked
    ]
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if len(runs) != len(answers):
        raise OptionError(
            "chat_template",
            f"that of {tokenizer.name_or_path or 'the tokenizer'}",
            f"{len(answers)} turns between {{% generation %}} marks in {example.id}, one for each of the assistant's",
            f"It marks {len(runs)}: mend the template, or take its marks out.",
        )
    labels = [IGNORED] * len(ids)
    for turn, run in zip(answers, runs, strict=True):
        if turn in example.trained or turn == answers[-1]:
            for i in run:
                labels[i] = ids[i]
    length = runs[-1][-1] + 1
    return ids[:length], labels[:length]


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
