"""Raw texts in a column ``text``: language modelling, with the loss on every token and the end token.

A text that is longer than ``max_length`` is cut into pieces of that length. Each piece begins with the last token of
the one before it, so that every token but the first is predicted once. Texts are evaluated by their loss alone.
"""

from __future__ import annotations

from collections.abc import Collection

from galore_trainer.recipes.base import Example, Parsed
from galore_trainer.recipes.sources import Row

FIELDS = ("text",)


def recognises(columns: Collection[str]) -> bool:
    """Whether rows with these columns are read by this recipe when ``data.task`` is auto."""
    return "text" in columns


def parse(rows: list[Row]) -> Parsed:
    """One example a row."""
    return Parsed([Example(messages=(), target=row.text("text"), answer=None, id=row.id) for row in rows], [])
