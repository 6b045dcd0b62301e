"""A user's own conversations, in the forms of ``chats``: messages, ShareGPT, prompts and completions, Alpaca.

Of a chat the last turn of the assistant is the target, the turns before it are the prompt, and the assistant's turns
among these are trained on as well; of a pair the completion alone is trained on. Texts stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection

from galore_trainer.recipes.base import Example, Parsed, counted
from galore_trainer.recipes.chats import conversation, form_of
from galore_trainer.recipes.sources import Row

FIELDS = (
    *("messages", "conversations", "prompt", "completion"),
    *("instruction", "input", "output", "system", "history"),
)


def recognises(columns: Collection[str]) -> bool:
    """Whether rows with these columns are read by this recipe when ``data.task`` is auto."""
    return form_of(columns) is not None


def parse(rows: list[Row]) -> Parsed:
    """Examples from conversations; trailing turns after the last answer are cut off and counted.

    Raises:
        OptionError: a row without an answer, or with an empty one, or without a user's turn before it.
    """
    examples, cut, untrained = [], 0, 0
    for row in rows:
        turns, given, field = conversation(row)
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= given]
        if not answers:
            raise row.refuse(field, "at least one turn of the assistant")
        *earlier, last = answers
        cut += last < len(turns) - 1
        if last == 0 or turns[last - 1]["role"] != "user":
            raise row.refuse(field, "a user's turn before the answer")
        if not turns[last]["content"].strip():
            raise row.refuse(field, "an answer that is not empty")
        trained = tuple(i for i in earlier if i > 0 and turns[i]["content"].strip())
        untrained += len(earlier) - len(trained)
        examples.append(
            Example(
                messages=tuple(turns[:last]), target=turns[last]["content"], answer=None, id=row.id, trained=trained
            )
        )
    notes = [f"{counted(cut, 'chat')} cut after the assistant's last turn"] if cut else []
    if untrained:
        count = counted(untrained, "turn")
        notes.append(f"{count} of the assistant read, not trained on: empty, or the first of a chat")
    return Parsed(examples, notes)
