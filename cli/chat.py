"""``galore-ft chat``."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from galore_trainer.cli.loading import require_reach
from galore_trainer.cli.options import Debug, Overrides, models
from galore_trainer.cli.outcome import say
from galore_trainer.errors import OptionError

if TYPE_CHECKING:
    from galore_trainer.run.chat import Conversation

RESET, EXIT = "/reset", "/exit"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # with which a model could command the terminal

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run's folder, a checkpoint's or model's folder, or a hub id.", autocompletion=models
    ),
]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="System message (default the run's data.system_prompt).")
]
Length = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        metavar="N",
        min=1,
        help="Longest answer, in tokens (default the run's eval.max_new_tokens).",
    ),
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="NUMBER", help="Of sampling; 0 takes the likeliest tokens.")
]
Compare = Annotated[bool, typer.Option("--compare", help="Show the answer of the model before training, too.")]


def chat(
    run: Run,
    overrides: Overrides = None,
    *,
    system: System = None,
    max_new_tokens: Length = None,
    temperature: Temperature = 0.0,
    compare: Compare = False,
    debug: Debug = False,
) -> None:
    """Talk to a trained model: galore-ft chat RUN [key=value ...].

    /reset begins a new conversation; /exit or Ctrl-D leaves; Ctrl-C stops an answer, and leaves where there is none.
    From a pipe, each line is a prompt of one conversation, and answers alone are printed.
    """
    if not 0 <= temperature < math.inf:
        raise OptionError("--temperature", temperature, "a finite number of at least 0")
    require_reach(run)
    from galore_trainer.run.chat import converse, find_target

    conversations = converse(
        find_target(run, overrides or ()),
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        compare=compare,
    )
    if sys.stdin.isatty():
        say(f"{RESET} begins anew; {EXIT} or Ctrl-D leaves; Ctrl-C stops an answer.")
        _in_terminal(conversations)
        return
    for line in sys.stdin:
        if line.strip() == EXIT:
            break
        _turn(conversations, line.strip())


def _in_terminal(conversations: dict[str, Conversation]) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then edits lines and remembers them
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if line == EXIT:
            return
        try:
            _turn(conversations, line, stops=(KeyboardInterrupt,))
        except OptionError as error:
            say(f"Error: {error}")


def _turn(conversations: dict[str, Conversation], line: str, *, stops: tuple[type[BaseException], ...] = ()) -> None:
    """Answer one line of the user's, or do what it commands.

    Args:
        conversations: by label.
        line: without blanks around it.
        stops: what ends an answer alone, not the command.
    """
    if not line:
        return
    if line == RESET:
        for conversation in conversations.values():
            conversation.reset()
        return
    if re.fullmatch(r"/\w+", line):
        raise OptionError("command", line, f"{RESET}, {EXIT} or a prompt")
    for label, conversation in conversations.items():
        if dropped := conversation.take(line):
            say(f"({dropped} of the oldest turns are forgotten: no room is left for them in the model's context)")
        if len(conversations) > 1:
            typer.echo(_coloured(f"{label}: "), nl=False)
        with contextlib.suppress(*stops):
            conversation.answer(_emit)
        typer.echo()


def _emit(text: str) -> None:
    if sys.stdout.isatty():
        text = CONTROLS.sub("", text)
    sys.stdout.write(text)
    sys.stdout.flush()


def _coloured(label: str) -> str:
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return label if plain else typer.style(label, fg=typer.colors.CYAN, bold=True)
