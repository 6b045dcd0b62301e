"""Rows from a local file or from the hub, each with the name of its place, so that a bad one can be pointed at."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from galore_trainer.errors import OptionError
from galore_trainer.recipes.base import EMBEDDED, REASONING_GYM, RESTAURANTS

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
Kind = Literal["embedded", "reasoning_gym", "file", "hub"]


@dataclass(frozen=True)
class Row:
    """One row: its fields, where it stands, and the option and source that it came from."""

    fields: Mapping[str, Any]
    place: str  # "line 12" of a text file, "row 12" elsewhere
    id: str
    option: str
    source: str

    def text(self, field: str) -> str:
        """The text in ``field``; ``OptionError`` naming file, line and field where there is none."""
        value = self.fields.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.refuse(field, "a text")
        return value

    def refuse(self, field: str, wanted: str, way_out: str = "") -> OptionError:
        """The error for this row: ``field`` is missing or holds something else than what is ``wanted``."""
        if field in self.fields:
            found = f"it has {_short(self.fields[field])}"
        else:
            found = f"its columns are {', '.join(map(str, self.fields)) or 'none'}"
        way_out = way_out or "Mend the row, or name the column with data.columns."
        return OptionError(self.option, self.source, f"{wanted} in field {field!r} of {self.place} ({found})", way_out)


def kind_of(option: str, source: str) -> Kind:
    """What a source is, told from its name alone; ``OptionError`` where it is nothing we know."""
    if source in (EMBEDDED, RESTAURANTS):
        return "embedded"
    if source == REASONING_GYM:
        return "reasoning_gym"
    path = Path(source).expanduser()
    if source and (path.suffix in SUFFIXES or path.exists()):
        return "file"
    if HUB_ID.fullmatch(source):
        return "hub"
    known = f"{EMBEDDED}, {RESTAURANTS}, {REASONING_GYM}, a hub id owner/name"
    raise OptionError(option, source, f"{known}, or a file ending in {', '.join(SUFFIXES)}")


def read_file(option: str, source: str, form: str | None = None) -> list[Row]:
    """All rows of a local file; ``OptionError`` names the file and the line of whatever is wrong with it.

    Args:
        option: the option that named the file, for errors.
        source: its path.
        form: one of ``SUFFIXES``, as which it is read; None for its own.
    """
    with _readable(option, source) as path:
        form = form or path.suffix
        if not path.is_file() or form not in SUFFIXES:
            raise OptionError(option, source, f"a file ending in {', '.join(SUFFIXES)}")
        rows = list(_parse(option, source, path, form))
    if not rows:
        raise OptionError(option, source, "at least one row", "The file has none.")
    return rows


def read_text(option: str, source: str) -> str:
    """The whole of a local text file; ``OptionError`` where there is none or it is no UTF-8."""
    with _readable(option, source) as path:
        return path.read_text(encoding="utf-8-sig")


@contextmanager
def _readable(option: str, source: str) -> Iterator[Path]:
    path = Path(source).expanduser()
    if not path.exists():
        raise OptionError(option, source, "an existing file", f"There is no {path.absolute()}.")
    try:
        yield path
    except UnicodeDecodeError as error:
        raise OptionError(option, source, f"UTF-8 text (byte {error.start} is not)", "Save it as UTF-8.") from error
    except OSError as error:
        raise OptionError(option, source, f"a readable file ({error})") from error


def _parse(option: str, source: str, path: Path, form: str) -> Iterator[Row]:
    unit = "row" if form == ".parquet" else "line"
    for number, fields in _numbered(option, source, path, form):
        if not isinstance(fields, dict):
            raise OptionError(option, source, f"an object with named fields in {unit} {number}, not {_short(fields)}")
        yield Row(fields, f"{unit} {number}", f"{path.name}:{number}", option, source)


def _numbered(option: str, source: str, path: Path, form: str) -> Iterable[tuple[int, Any]]:
    if path.stat().st_size == 0:
        return []
    if form == ".parquet":
        return _parquet(option, source, path)
    text = path.read_text(encoding="utf-8-sig")
    if form == ".csv":
        return _csv(option, source, text)
    if form == ".json" and text.lstrip()[:1] == "[":
        return _json_array(option, source, text)
    return _json_lines(option, source, text)


def _json_lines(option: str, source: str, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise _malformed(option, source, "JSON", number, f"column {error.colno}: {error.msg}") from error


def _json_array(option: str, source: str, text: str) -> Iterator[tuple[int, Any]]:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise _malformed(option, source, "JSON", error.lineno, f"column {error.colno}: {error.msg}") from error
    between, decoder = re.compile(r"[\s,]*"), json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = between.match(text, position).end()  # type: ignore[union-attr]
        if text[position] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        value, position = decoder.raw_decode(text, position)
        yield line, value


def _csv(option: str, source: str, text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    number, header = 1, None
    try:
        for cells in reader:
            if header is None:
                header = cells
                if len(set(header)) != len(header) or not all(header):
                    raise OptionError(option, source, f"a header of different names in line 1, not {_short(header)}")
            elif cells:
                if len(cells) != len(header):
                    raise _malformed(option, source, "CSV", number, f"{len(cells)} cells under {len(header)} names")
                yield number, dict(zip(header, cells, strict=True))
            number = reader.line_num + 1
    except csv.Error as error:
        raise _malformed(option, source, "CSV", number, str(error)) from error


def _parquet(option: str, source: str, path: Path) -> Iterable[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
    except pyarrow.ArrowException as error:
        raise OptionError(option, source, f"a Parquet file ({error})") from error


def _malformed(option: str, source: str, form: str, line: int, reason: str) -> OptionError:
    return OptionError(option, source, f"well-formed {form}; line {line} is not ({reason})", "Mend or remove the line.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def rename_columns(rows: list[Row], columns: Mapping[str, str]) -> list[Row]:
    """Give columns the recipe's own names, ``{recipe's name: column}``; a column that no row has is an error."""
    renamed = []
    for row in rows:
        for column in columns.values():
            if column not in row.fields:
                found = ", ".join(map(str, row.fields))
                raise OptionError("data.columns", column, f"a column of {row.source} ({row.place} has: {found})")
        kept = {name: value for name, value in row.fields.items() if name not in columns.values()}
        fields = {**kept, **{name: row.fields[column] for name, column in columns.items()}}
        renamed.append(Row(fields, row.place, row.id, row.option, row.source))
    return renamed
