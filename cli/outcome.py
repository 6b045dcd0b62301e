"""The exit code of a command, and the message of an error.

Exit codes: 0 done, 1 the run failed, 2 a command line or configuration that cannot be honoured, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import time

from galore_trainer.errors import OptionError, one_line
from galore_trainer.run.launching.distributed import is_main_process

FAILED, USAGE, INTERRUPTED = 1, 2, 130
SECONDS_FOR_RANK_0 = 3.0
PLAIN = (RuntimeError, OSError, ValueError, ImportError, MemoryError, FloatingPointError)
"""Errors whose message is a sentence; for others the type is printed, too."""
# Beginning of the name of an error's package -> what happened, where the message itself does not say it.
LEADS = {
    "httpx": "the network failed",  # and httpx2
    "httpcore": "the network failed",
    "jinja2": "the chat template of the tokenizer cannot be used",
    "pickle": "a file holds Python objects, which are not loaded",
}


def say(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr, flush=True)


def interrupted() -> int:
    """Say that Ctrl-C ended the command, and return the exit code."""
    say(f"{chr(10) if sys.stderr.isatty() else ''}Interrupted.")  # a terminal has just shown ^C
    return INTERRUPTED


def report_error(error: BaseException, *, debug: bool) -> int:
    """Say what went wrong and return the exit code.

    A traceback is shown with ``--debug``, and for a failed assertion of this program, which is a bug to report.
    """
    usage = hasattr(error, "format_message") and hasattr(error, "show")  # the command-line parser's own
    if (no_path := _no_path(error)) is not None:
        error = no_path
    code = USAGE if usage or isinstance(error, OptionError) else FAILED
    rank = "" if is_main_process() else f" on rank {os.environ['RANK']}"
    if rank and code == USAGE:
        # Most such errors occur on every rank: rank 0 prints them, and its launcher ends the others meanwhile.
        time.sleep(SECONDS_FOR_RANK_0)
    if debug or (isinstance(error, AssertionError) and "site-packages" not in _raised_in(error)[0]):
        import traceback

        traceback.print_exception(error)
    elif usage and not rank:
        error.show()  # type: ignore[attr-defined]
    elif code == USAGE:
        say(f"Error{rank}: {error}")
    else:
        say(f"Failed{rank}: {in_words(error)}")
        say("Add --debug for the full traceback.")
    return code


def _no_path(error: BaseException) -> OptionError | None:
    """The error for a text that cannot be a path on this system, wherever it was given."""
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return OptionError("path", str(error.filename)[:80], "a path", f"The system says: {error.strerror}.")
    if isinstance(error, RuntimeError) and str(error).startswith("Could not determine home"):
        return OptionError("path", "~", "the folder of a user", "A path begins with ~ and no user's name: write ~/.")
    return None


def in_words(error: BaseException) -> str:
    """An error in one line: its message, after what it means or its type where the message alone does not tell."""
    text, kind = one_line(error), type(error).__name__
    packages = tuple(cls.__module__.lstrip("_") for cls in type(error).__mro__)
    lead = next((lead for start, lead in LEADS.items() if any(name.startswith(start) for name in packages)), None)
    if lead:
        return f"{lead}: {text}"
    if isinstance(error, PLAIN) or text == kind:
        return text
    return f"{kind}{_place(error)}: {text}"


def _place(error: BaseException) -> str:
    file, line = _raised_in(error)
    return f" in {os.path.basename(file)}, line {line}" if file else ""


def _raised_in(error: BaseException) -> tuple[str, int]:
    """File and line where an error was raised; an empty name for one that was not."""
    step = error.__traceback__
    if step is None:
        return "", 0
    while step.tb_next is not None:
        step = step.tb_next
    return step.tb_frame.f_code.co_filename, step.tb_lineno
