"""Tables for people: drawn by rich on a terminal, aligned lines of plain text elsewhere."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

WIDEST = 10_000  # characters in a line of plain text, which is never folded
GAP = 2  # blanks between columns
NARROWEST = 30  # characters in a line of a folded cell


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table; as a ``str`` it is plain text with a line for each row.

    Args:
        head: the columns' titles.
        rows: cells in the order of ``head``.
        numeric: titles of the columns that are aligned on the right and never folded.
        notes: lines below.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Collection[str] = ()
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(
            file=io.StringIO(), width=WIDEST, color_system=None, force_terminal=False, markup=False, emoji=False
        )
        with console.capture() as capture:
            console.print(self._drawn())
        return "\n".join(line.rstrip() for line in [*capture.get().splitlines(), *self.notes])

    def show(self) -> None:
        """Print it: on a terminal that is wide enough with long cells folded, elsewhere as plain text."""
        if sys.stdout.isatty():
            from rich.console import Console

            console, table = Console(markup=False, emoji=False, highlight=False), self._drawn()
            least = sum((column.min_width or 0) + GAP for column in table.columns) - GAP
            if least <= console.width:
                console.print(table, *self.notes, sep="\n", soft_wrap=True)
                return
        print(self, flush=True)

    def _drawn(self) -> Table:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
        for title, *cells in zip(self.head, *self.rows, strict=True):
            number, width = title in self.numeric, max(map(len, (title, *cells)))
            least = width if number else min(width, NARROWEST)
            table.add_column(title, justify="right" if number else "left", overflow="fold", min_width=least)
        for row in self.rows:
            table.add_row(*row)
        return table


def human_bytes(number: float) -> str:
    """Bytes in the largest binary unit that leaves at least one before the point."""
    # Not accelerate's convert_bytes: it divides by 1024 and writes KB, MB and GB.
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError
