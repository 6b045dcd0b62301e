"""Rows from a local file or from the hub, with the place of each, so that an error can name it."""

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
_DECODER, _BLANKS = json.JSONDecoder(), re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
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
        """The error for this row, whose ``field`` is missing or does not hold what is ``wanted``."""
        if field in self.fields:
            actual = f"it has {_short(self.fields[field])}"
        else:
            actual = f"its columns are {', '.join(map(str, self.fields)) or 'none'}"
        way_out = way_out or "Mend the row, or name the column with data.columns."
        return OptionError(self.option, self.source, f"{wanted} in field {field!r} of {self.place} ({actual})", way_out)


def kind_of(option: str, source: str) -> Kind:
    """The kind of a source, from its name alone; ``OptionError`` where the name fits none."""
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
    """All rows of a local file; an ``OptionError`` names the file and the line.

    Args:
        option: the option that named the file, for errors.
        source: its path.
        form: the one of ``SUFFIXES`` to read it as; None for the file's suffix.
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


class MalformedJson(ValueError):
    """Text that is no usable JSON.

    Attributes:
        position: index in the text.
        reason: in words.
    """

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.reason, self.position = reason, position


def decode_json(text: str, position: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at or after ``position``, and the position of what follows it and its blanks.

    Raises:
        MalformedJson: a syntax error, too deep a nesting, an integer of thousands of digits, half a surrogate pair.
    """
    start = _after_blanks(text, position)
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise MalformedJson(error.msg, error.pos) from error
    except RecursionError:
        raise MalformedJson("brackets are nested too deeply", start) from None
    except ValueError as error:  # Python's limit on the digits of an integer
        raise MalformedJson("an integer has too many digits", start) from error
    if half := _SURROGATE.search(text, start, end):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            reason = f"{half.group()} or a later one is half of a surrogate pair, which is no character"
            raise MalformedJson(reason, half.start()) from error
    return value, _after_blanks(text, end)


def _after_blanks(text: str, position: int) -> int:
    return _BLANKS.match(text, position).end()  # type: ignore[union-attr]


def _json_lines(option: str, source: str, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value, end = decode_json(line)
                if end < len(line):
                    raise MalformedJson("more than one value", end)
            except MalformedJson as error:
                reason = f"column {error.position + 1}: {error.reason}"
                raise _malformed(option, source, "JSON", number, reason) from error
            yield number, value


def _json_array(option: str, source: str, text: str) -> Iterator[tuple[int, Any]]:
    line, counted, position = 1, 0, _after_blanks(text, text.index("[") + 1)
    try:
        while text[position : position + 1] != "]":
            line, counted = line + text.count("\n", counted, position), position
            value, position = decode_json(text, position)
            yield line, value
            if text[position : position + 1] == ",":
                position = _after_blanks(text, position + 1)
                if text[position : position + 1] == "]":
                    raise MalformedJson("nothing follows the comma", position)
            elif text[position : position + 1] != "]":
                raise MalformedJson("',' or ']' is missing", position)
        if (end := _after_blanks(text, position + 1)) < len(text):
            raise MalformedJson("something follows the closing bracket", end)
    except MalformedJson as error:
        number = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise _malformed(option, source, "JSON", number, f"column {column}: {error.reason}") from error


def _csv(option: str, source: str, text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    number, header = 1, None
    limit = csv.field_size_limit(max(len(text), 1))  # its default of 131,072 characters is less than a long document
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
    finally:
        csv.field_size_limit(limit)


def _parquet(option: str, source: str, path: Path) -> Iterable[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the latter of a date out of range
        raise OptionError(option, source, f"a Parquet file ({' '.join(str(error).split())})") from error


def _malformed(option: str, source: str, form: str, line: int, reason: str) -> OptionError:
    return OptionError(option, source, f"well-formed {form}; line {line} is not ({reason})", "Mend or remove the line.")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} with brackets nested deeply"
    return text if len(text) <= 60 else text[:57] + "..."


def rename_columns(rows: list[Row], columns: Mapping[str, str]) -> list[Row]:
    """Rename columns as ``{recipe's name: column}`` says; a column that a row lacks is an error."""
    renamed = []
    for row in rows:
        for column in columns.values():
            if column not in row.fields:
                there = ", ".join(map(str, row.fields))
                raise OptionError("data.columns", column, f"a column of {row.source} ({row.place} has: {there})")
        kept = {name: value for name, value in row.fields.items() if name not in columns.values()}
        fields = {**kept, **{name: row.fields[column] for name, column in columns.items()}}
        renamed.append(Row(fields, row.place, row.id, row.option, row.source))
    return renamed
