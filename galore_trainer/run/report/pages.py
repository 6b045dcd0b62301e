"""A report's parts, and the two ways they are written: Markdown, and one HTML page that needs no other file."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Sequence


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

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #fff; --band: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa4af; --line: #3a424b; --paper: #14181d; --band: #1d232a; }
}
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 74rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
p, li { max-width: 46rem; } ul { padding-left: 1.2rem; } li { color: var(--soft); font-size: .9rem; }
.table { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; color: var(--soft); font-weight: 600; min-width: 2.5rem; }
th:first-child, td:first-child { text-align: left; padding-left: .3rem; min-width: 8rem; }
td:first-child { font-weight: 600; } tbody tr:nth-child(even) { background: var(--band); }
td.rest { text-align: left; white-space: normal; color: #c0392b; } td.text { text-align: left; white-space: normal; }
@media (prefers-color-scheme: dark) { td.rest { color: #ff8a7a; } }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
pre { overflow-x: auto; background: var(--band); padding: .8rem 1rem; border-radius: 6px; font-size: .8rem;
  line-height: 1.45; } summary { cursor: pointer; color: var(--soft); }
"""


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report as GitHub's Markdown; plots are the PNG files beside it."""
    return "\n\n".join([f"# {title}", *map(_markdown, blocks)]) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The report as one page: plots are inside, nothing is fetched."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_escape(title)}</h1>\n" + "\n".join(map(_html, blocks)) + "\n</body>\n</html>\n"
    )


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
            left = _left_columns(rows)
            marks = ["---" if i in {0, *left} else "---:" for i in range(len(head))]
            filled = [[*row, *[""] * (len(head) - len(row))] for row in rows]
            lines = [list(head), marks, *filled]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_escape(text)}</h2>"
        case Text(text):
            return f"<p>{_escape(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_escape(item)}</li>" for item in items) + "</ul>"
        case Plot(alt=alt, svg=svg):
            return f'<figure role="img" aria-label="{html.escape(alt)}">{svg}</figure>'
        case Code(text, summary):
            pre = f"<pre>{_escape(text.rstrip())}</pre>"
            return f"<details><summary>{_escape(summary)}</summary>{pre}</details>" if summary else pre
        case Table(head, rows):
            left = _left_columns(rows)
            names = "".join(f"<th{_class(i in left)}>{_escape(cell)}</th>" for i, cell in enumerate(head))
            lines = "\n".join(f"<tr>{_html_row(row, len(head), left)}</tr>" for row in rows)
            return f'<div class="table"><table><thead><tr>{names}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'


def _escape(text: str) -> str:
    return html.escape(text, quote=False)


def _html_row(row: Sequence[str], columns: int, left: set[int]) -> str:
    cells = [f"<td{_class(i in left)}>{_escape(cell)}</td>" for i, cell in enumerate(row)]
    if len(row) < columns:
        cells[-1] = f'<td class="rest" colspan="{columns - len(row) + 1}">{_escape(row[-1])}</td>'
    return "".join(cells)


def _class(text: bool) -> str:
    return ' class="text"' if text else ""


def _left_columns(rows: Sequence[Sequence[str]]) -> set[int]:
    """Columns that hold words, which read better from the left: those without any number."""
    width = max(map(len, rows), default=0)
    whole = [row for row in rows if len(row) == width]
    return {i for i in range(1, width) if not any(re.match(r"-?\d", row[i]) for row in whole)}
