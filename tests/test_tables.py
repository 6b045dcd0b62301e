"""Tables: plain text that is aligned, and on a terminal no digit that is folded or cut."""

from __future__ import annotations

import io
import re
import sys

import pytest

from galore_trainer.tables import TextTable, human_bytes

NAME = "24 x model.layers.*.self_attn.q_proj"
TABLE = TextTable(
    ("weights", "kind", "n", "state"),
    [(NAME, "plain [red]x[/red] :smile:", "1,234", "1.0 MiB"), ("all", "", "12", "216.0 KiB")],
    {"n", "state"},
    ["- a note: 5 \x1b"],
)
PLAIN = f"""\
weights                               kind                            n      state
{NAME}  plain [red]x[/red] :smile:  1,234    1.0 MiB
all                                                                  12  216.0 KiB
- a note: 5 \x1b"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {"TERM": "xterm", "COLUMNS": str(width), "LINES": "50"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal())
        TABLE.show()
        return re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue())  # type: ignore[attr-defined]


def test_plain_text_is_aligned_as_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    lines = [TABLE.head, *TABLE.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    by_hand = [
        "  ".join(
            cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    assert str(TABLE) == PLAIN == "\n".join([*(line.rstrip() for line in by_hand), *TABLE.notes])
    TABLE.show()
    assert capsys.readouterr().out == PLAIN + "\n"
    assert str(TextTable(("a", "b"), [])) == "a  b"


def test_a_terminal_folds_names_alone_and_one_that_is_too_narrow_none(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = on_terminal(200, monkeypatch).splitlines()
    assert [line.rstrip() for line in wide[:3]] == PLAIN.splitlines()[:3]
    folded = on_terminal(78, monkeypatch).splitlines()
    assert len(folded) > 4
    assert all(len(line) <= 78 for line in folded)
    assert [line for line in folded if line.rstrip().endswith("1,234    1.0 MiB")]
    assert "".join(line[:32].strip() for line in folded[1:4]).startswith("24 xmodel.layers.*.self_attn.q_proj")
    assert on_terminal(70, monkeypatch) == PLAIN + "\n"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (2**30, "1.0 GiB"),
        (2**41, "2048.0 GiB"),
    ],
)
def test_bytes_are_in_binary_units_that_are_named_so(number: float, text: str) -> None:
    assert human_bytes(number) == text
