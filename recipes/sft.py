"""A user's own chats (``messages``) or pairs (``prompt``, ``completion``), in the forms that TRL takes as well.

Of a chat the last assistant turn is the target and the turns before it are the prompt. A prompt or completion is a
text, or a list of ``{"role", "content"}`` turns; a CSV cell may hold such a list as JSON. Texts stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from galore_trainer.recipes.base import Example, Parsed, counted
from galore_trainer.recipes.sources import MalformedJson, Row, decode_json

FIELDS = ("messages", "prompt", "completion")
ROLES = ("system", "user", "assistant")


def recognises(columns: Collection[str]) -> bool:
    """Whether rows with these columns are read by this recipe when ``data.task`` is auto."""
    return "messages" in columns or {"prompt", "completion"} <= set(columns)


def parse(rows: list[Row]) -> Parsed:
    """Examples from chats and pairs; trailing turns after the last answer are cut off and counted."""
    examples, cut = [], 0
    for row in rows:
        if row.fields.get("messages") is not None:
            turns = _turns(row, "messages", None)
            last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
            if last is None:
                raise row.refuse("messages", "at least one turn of the assistant")
            cut += last < len(turns) - 1
            prompt, answer, field = turns[:last], turns[last], "messages"
        else:
            prompt, field = _turns(row, "prompt", "user"), "prompt"
            completion = _turns(row, "completion", "assistant")
            if len(completion) != 1 or completion[0]["role"] != "assistant":
                raise row.refuse("completion", "a text or one turn of the assistant")
            answer = completion[0]
        if not prompt or prompt[-1]["role"] != "user":
            raise row.refuse(field, "a user's turn before the answer")
        if not answer["content"].strip():
            raise row.refuse("completion" if field == "prompt" else field, "an answer that is not empty")
        examples.append(Example(messages=tuple(prompt), target=answer["content"], answer=None, id=row.id))
    return Parsed(examples, [f"{counted(cut, 'chat')} cut after the assistant's last turn"] if cut else [])


def _turns(row: Row, field: str, role: str | None) -> list[dict[str, str]]:
    """A field as turns: a list as it is, JSON text of a list decoded, other text as one turn of ``role``."""
    value: Any = row.fields.get(field)
    if isinstance(value, str):
        if value.lstrip().startswith("[") and (decoded := _json_turns(value)) is not None:
            value = decoded
        elif role is not None:
            return [{"role": role, "content": row.text(field)}]
    if not isinstance(value, list) or not value:
        raise row.refuse(field, "a list of turns" if role is None else "a text or a list of turns")
    for turn in value:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise row.refuse(field, f"turns with 'role' (one of {', '.join(ROLES)}) and 'content' (a text)")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _json_turns(text: str) -> list[Any] | None:
    try:
        value, end = decode_json(text)
    except MalformedJson:
        return None
    turns = isinstance(value, list) and all(isinstance(v, dict) and "role" in v for v in value)
    return value if turns and end == len(text) else None
