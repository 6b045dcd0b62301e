"""The forms in which people keep conversations, each told by its columns and read into the same turns.

    messages        [{"role": "user", "content": "Hi."}, ...], as OpenAI and TRL have it
    ShareGPT        conversations: [{"from": "human", "value": "Hi."}, ...]
    pairs           prompt, completion: texts, or lists of turns
    Alpaca          instruction, input, output, with system and history where there are such columns

A turn has the keys of either of the first two forms, whatever its column is called. A list may stand as JSON in a CSV
cell. Turns of tools and functions are refused: what a model reads of them differs from template to template.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from galore_trainer.recipes.sources import MalformedJson, Row, decode_json

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
"""The names in use for the three roles."""
OF_TOOLS = ("tool", "tools", "function", "function_call", "function-call", "observation", "ipython")
KEYS = (("role", "content"), ("from", "value"))
WITHOUT_TOOLS = "Turns of tools are not trained on here: leave out such rows."
Turns = list[dict[str, str]]


class Conversation(NamedTuple):
    """The turns of a row, how many of them are a prompt that is not trained on, and the field of the answer."""

    turns: Turns
    given: int
    field: str


def form_of(columns: Collection[str]) -> str | None:
    """The form that rows with these columns have; None where they are no conversations."""
    return next((form for form, (needed, _) in FORMS.items() if needed <= set(columns)), None)


def conversation(row: Row) -> Conversation:
    """The turns of a row, by the first form whose columns it fills.

    Raises:
        OptionError: naming the row and the field that is missing, empty or no list of turns.
    """
    if row.fields.get("tools") not in (None, "", [], "[]"):
        raise row.refuse("tools", "no tools", WITHOUT_TOOLS)
    form = form_of([name for name, value in row.fields.items() if value is not None])
    if form is None:  # the reader of the nearest form names what is missing
        form = next((form for form, (needed, _) in FORMS.items() if needed & row.fields.keys()), "prompt")
    return FORMS[form][1](row)


def _messages(row: Row) -> Conversation:
    return Conversation(_turns(row, "messages", None), 0, "messages")


def _share_gpt(row: Row) -> Conversation:
    turns = _turns(row, "conversations", None)
    return Conversation([*_system(row), *turns] if turns[0]["role"] != "system" else turns, 0, "conversations")


def _pair(row: Row) -> Conversation:
    prompt, completion = _turns(row, "prompt", "user"), _turns(row, "completion", "assistant")
    if completion[0]["role"] != "assistant" or completion[-1]["role"] != "assistant":
        raise row.refuse("completion", "a text, one turn of the assistant, or turns from one to another")
    if prompt[-1]["role"] != "user":
        raise row.refuse("prompt", "a user's turn before the answer")
    return Conversation([*prompt, *completion], len(prompt), "completion")


def _alpaca(row: Row) -> Conversation:
    turns = _system(row)
    history = _decoded(row.fields.get("history") or [], list)
    if not isinstance(history, list):
        raise row.refuse("history", "a list of pairs of texts")
    for pair in history:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise row.refuse("history", "a list of pairs of texts")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    more = row.fields.get("input")
    if more is not None and not isinstance(more, str):
        raise row.refuse("input", "a text")
    request = row.text("instruction") if not (more or "").strip() else f"{row.text('instruction')}\n{more}"
    output = row.fields.get("output")
    if not isinstance(output, str):
        raise row.refuse("output", "a text")
    turns += [{"role": "user", "content": request}, {"role": "assistant", "content": output}]
    return Conversation(turns, 0, "output")


FORMS: dict[str, tuple[set[str], Callable[[Row], Conversation]]] = {
    "messages": ({"messages"}, _messages),
    "sharegpt": ({"conversations"}, _share_gpt),
    "prompt": ({"prompt", "completion"}, _pair),
    "alpaca": ({"instruction", "output"}, _alpaca),
}
"""The forms in the order in which columns are looked for: the columns that tell each, and its reader."""


def _system(row: Row) -> Turns:
    text = row.fields.get("system")
    if text is not None and not isinstance(text, str):
        raise row.refuse("system", "a text")
    return [{"role": "system", "content": text}] if text and text.strip() else []


def _turns(row: Row, field: str, role: str | None) -> Turns:
    """A field as turns: a list as it is, JSON text of a list decoded, other text as one turn of ``role``."""
    value: Any = _decoded(row.fields.get(field), dict)
    if isinstance(value, str) and role is not None:
        return [{"role": role, "content": row.text(field)}]
    if not isinstance(value, list) or not value:
        raise row.refuse(field, "a list of turns" if role is None else "a text or a list of turns")
    return [_turn(row, field, number, turn) for number, turn in enumerate(value, start=1)]


def _turn(row: Row, field: str, number: int, turn: Any) -> dict[str, str]:
    if isinstance(turn, dict):
        for role_key, text_key in KEYS:
            role, text = turn.get(role_key), turn.get(text_key)
            if turn.get("tool_calls") or turn.get("function_call") or role in OF_TOOLS:
                raise row.refuse(field, f"no turn of a tool, as turn {number} is,", WITHOUT_TOOLS)
            if isinstance(role, str) and role in ROLES and isinstance(text, str):
                return {"role": ROLES[role], "content": text}
    names = ", ".join(dict.fromkeys(ROLES.values()))
    wanted = f"turns with 'role' (one of {names}) and 'content' (a text), or 'from' (human, gpt, system) and 'value'"
    raise row.refuse(field, f"{wanted}, unlike turn {number},")


def _decoded(value: Any, entry: type) -> Any:
    """A value as it is; of a text that writes a list of such entries as JSON the list."""
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return value
    try:
        decoded, end = decode_json(value)
    except MalformedJson:
        return value
    is_list = end == len(value) and isinstance(decoded, list) and bool(decoded)
    return decoded if is_list and all(isinstance(item, entry) and _is_turn(item) for item in decoded) else value


def _is_turn(item: Any) -> bool:
    return isinstance(item, list) or any(role in item for role, _ in KEYS)
