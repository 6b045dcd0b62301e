"""A report's parts, and the two ways they are written: Markdown, and one HTML page that needs no other file."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose first column names the row; a row shorter than the head ends in a cell that spans the rest."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure.

    Args:
        name: of its PNG file, without the ending.
        alt: what it shows, in a sentence.
        svg: for the HTML page; lines and letters in ``currentColor``.
        png: for Markdown and elsewhere, on white.
    """

    name: str
    alt: str
    svg: str
    png: bytes


@dataclasses.dataclass(frozen=True)
class Code:
    """Text to be copied; with a summary the page folds it."""

    text: str
    summary: str = ""


Block = Heading | Text | Bullets | Table | Plot | Code


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report as GitHub's Markdown; plots are the PNG files beside it."""
    return "\n\n".join([f"# {title}", *map(_markdown, blocks)]) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The report as one page: plots are inside, nothing is fetched, and texts are escaped."""
    import jinja2
    from markupsafe import Markup

    def as_text(value: object) -> Markup:
        """Leave quotes, which are no markup between tags, to be read and searched for; attributes escape them, too."""
        return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=False))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=as_text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    kinds = [(type(block).__name__, block) for block in blocks]
    page = environment.get_template("page.html.jinja")
    return page.render(title=title, blocks=kinds, text_columns=_text_columns)


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Text(text):
            return text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Plot(name=name, alt=alt):
            return f"![{alt}]({name}.png)"
        case Code(text, summary):
            return (f"{summary}:\n\n" if summary else "") + f"```\n{text.rstrip()}\n```"
        case Table(head, rows):
            left = _text_columns(rows)
            marks = ["---" if i in {0, *left} else "---:" for i in range(len(head))]
            filled = [[*row, *[""] * (len(head) - len(row))] for row in rows]
            lines = [list(head), marks, *filled]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _text_columns(rows: Sequence[Sequence[str]]) -> set[int]:
    """Columns that hold words, which read better from the left: those without any number."""
    width = max(map(len, rows), default=0)
    whole = [row for row in rows if len(row) == width]
    return {i for i in range(1, width) if not any(re.match(r"-?\d", row[i]) for row in whole)}
