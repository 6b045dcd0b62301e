"""``OptionError``, the error for a user: the option, its value, what is wanted instead, and the way out."""

from __future__ import annotations

import re
from typing import Any

LONGEST = 400
"""Characters of another package's message that an error repeats."""
ADDRESS = re.compile(r"https?://\S+")


class OptionError(ValueError):
    """A setting that cannot be honoured.

    Args:
        option: dotted name as the user writes it, for example ``galore.rank`` or ``data.source``.
        got: what the user gave; shown with ``repr``.
        wanted: what would have been accepted, in words.
        way_out: what to do now, in words; may be empty where ``wanted`` is enough.
    """

    def __init__(self, option: str, got: Any, wanted: str, way_out: str = "") -> None:
        self.option, self.got, self.wanted, self.way_out = option, got, wanted, way_out
        text = f"{option}: got {got!r}, wanted {wanted}."
        super().__init__(f"{text} {way_out}" if way_out else text)

    def __reduce__(self) -> tuple[type[OptionError], tuple[str, Any, str, str]]:
        """Pickle by the constructor's arguments, so that another process gets the attributes too."""
        return type(self), (self.option, self.got, self.wanted, self.way_out)


def one_line(error: BaseException) -> str:
    """An error's message in one line of ``LONGEST`` characters, or more where an address would be cut.

    It is the error's type where the message is empty.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    addresses = (match.span() for match in ADDRESS.finditer(text))
    end = next((stop for start, stop in addresses if start < LONGEST < stop), LONGEST)
    return text if len(text) <= end else f"{text[:end]} ..."


def typed_line(error: BaseException) -> str:
    """``one_line`` after the error's type, for example ``KeyError: 'state'``; the type alone without a message."""
    kind, text = type(error).__name__, one_line(error)
    return kind if text == kind else f"{kind}: {text}"
