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

            console = Console(markup=False, emoji=False, highlight=False)
            if sum(width + GAP for width in self._least_widths()) - GAP <= console.width:
                console.print(self._drawn(), *self.notes, sep="\n", soft_wrap=True)
                return
        print(self, flush=True)

    def _least_widths(self) -> list[int]:
        """Characters that each column needs: a number all of its own, a text enough to be folded."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        return [w if title in self.numeric else min(w, NARROWEST) for title, w in zip(self.head, widths, strict=True)]

    def _drawn(self) -> Table:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
        for title, width in zip(self.head, self._least_widths(), strict=True):
            if title in self.numeric:  # without a width: rich before 14.3 adds the gap to that of the last column, too
                table.add_column(title, justify="right", no_wrap=True)
            else:
                table.add_column(title, overflow="fold", min_width=width)
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
