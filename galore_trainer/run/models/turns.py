"""What a model reads of a conversation, as text: the prompt of an answer, and the parts that are trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from galore_trainer.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from galore_trainer.recipes import Example

PLAIN_TURN = {"system": "{}\n\n", "user": "Question: {}\n", "assistant": "Answer: {}\n\n"}
MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""What a chat template has before an answer if it tells itself what is trained on."""


class Part(NamedTuple):
    """A stretch of a conversation's text, and whether it is trained on."""

    text: str
    trained: bool


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
        return _render(tokenizer, messages, name, ask=True)
    return begin_text(tokenizer) + "".join(PLAIN_TURN[m["role"]].format(m["content"]) for m in messages) + "Answer:"


def begin_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The begin token where the tokenizer sets one by itself, else nothing."""
    begin = tokenizer("")["input_ids"][:1]
    return str(tokenizer.bos_token) if begin and begin[0] == tokenizer.bos_token_id else ""


def marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template tells by ``{% generation %}`` what is trained on."""
    return bool(tokenizer.chat_template) and MARKS.search(tokenizer.get_chat_template()) is not None


def whole_chat(example: Example) -> list[dict[str, str]]:
    """All turns of an example, the answer among them."""
    return [*map(dict, example.messages), {"role": "assistant", "content": example.target}]


def parts(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[Part]:
    """The text of a conversation in its parts; the last one is trained on.

    A trained part is what the chat template writes from the prompt of a turn to the end of it, without blanks at its
    end: the text and what ends the turn.

    Raises:
        OptionError: a template that raises, or that writes an earlier turn otherwise once later ones follow.
    """
    return _templated(tokenizer, example) if tokenizer.chat_template else _plain(tokenizer, example)


def template_error(
    tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], name: str, error: Exception
) -> OptionError:
    """The error for a chat template that raises on turns of these roles."""
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


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], name: str, *, ask: bool) -> str:
    try:
        text = str(tokenizer.apply_chat_template([*map(dict, messages)], tokenize=False, add_generation_prompt=ask))
        if not text:
            raise ValueError("it writes nothing")
        return text
    except Exception as error:  # a template is a program and may raise anything
        raise template_error(tokenizer, [m["role"] for m in messages], name, error) from error


def _templated(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[Part]:
    prompt, turns = render_prompt(tokenizer, example.messages, example.id), whole_chat(example)
    whole = _render(tokenizer, turns, example.id, ask=False)
    if not whole.startswith(prompt):  # the prompt holds what only an answer in the making has, such as an open <think>
        whole = prompt + example.target
    pieces, written = [], 0
    for turn in (*example.trained, len(turns) - 1):
        last = turn == len(turns) - 1
        begin = prompt if last else render_prompt(tokenizer, turns[:turn], example.id)
        done = whole if last else _render(tokenizer, turns[: turn + 1], example.id, ask=False)
        answer = done[len(begin) :].rstrip()
        if not (done.startswith(begin) and whole.startswith(begin + answer)):
            raise OptionError(
                "chat_template",
                f"that of {tokenizer.name_or_path or 'the tokenizer'}",
                f"a template that writes turn {turn + 1} of {example.id} the same whatever follows",
                "This one does not, as templates that drop earlier thinking do not. Train on the last turn of each "
                "chat with data.train_on=last, or save a template with {% generation %} marks with the tokenizer.",
            )
        pieces += [Part(whole[written : len(begin)], False), Part(answer, True)]
        written = len(begin) + len(answer)
    return pieces


def _plain(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[Part]:
    pieces, read = [], begin_text(tokenizer)
    for number, turn in enumerate(example.messages):
        text = PLAIN_TURN[turn["role"]].format(turn["content"])
        if number in example.trained:
            mark, answer = "Answer:", f" {turn['content']}"
            pieces += [Part(read + mark, False), Part(answer, True)]
            read = text[len(mark + answer) :]
        else:
            read += text
    return [*pieces, Part(f"{read}Answer:", False), Part(f" {example.target}", True)]
