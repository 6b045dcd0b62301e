"""YAML as people write it: 1.2 scalars (``1e-4`` is a number, ``on`` a text), no key twice, errors with their line.

Tags, keys that are no texts, and numbers out of range are refused. A file that repeats a part by aliases many times
over is refused before it is built, as it could fill any memory.

ruamel.yaml would save none of this: it has no limit but depth, reads dates, ``1_000`` and ``0b1`` as other things than
texts in YAML 1.2, too, and would write a text of several lines in another way than existing files have.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from galore_trainer.errors import OptionError

# The core schema of YAML 1.2, section 10.3.2: tag, pattern, characters a match can start with.
CORE_SCHEMA: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
)
TAG = "tag:yaml.org,2002:"
MERGE = TAG + "merge"
LARGEST = 2**63  # of an integer
DEEPEST, MOST_VALUES, MOST_CHARACTERS = 50, 5_000, 200_000  # what is read in well under a second


class _Refused(yaml.MarkedYAMLError):
    """YAML that is valid and not accepted: where, what stands there, what was wanted, and the way out."""

    def __init__(self, mark: Any, got: str, wanted: str, way_out: str = "") -> None:
        super().__init__(problem=f"{got}, wanted {wanted}", problem_mark=mark)
        self.line = mark.line + 1 if mark else 1
        self.got, self.wanted, self.way_out = got, wanted, way_out


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 and the limits of this module."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.sizes: dict[int, int] = {}  # of a finished node, by its id: nodes in it, with aliases written out
        self.depth = self.count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        alias = isinstance(event, yaml.AliasEvent)
        if tag := getattr(event, "tag", None):
            way_out = "Remove it: values are read as they are written."
            raise _Refused(event.start_mark, tag.replace(TAG, "!!"), "a value without a tag", way_out)
        if self.depth == DEEPEST:
            raise _Refused(event.start_mark, "one level more", f"at most {DEEPEST} levels of lists and mappings")
        before, self.depth = self.count, self.depth + 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is None:
            return None
        if not alias:
            self.count += 1
            self.sizes[id(node)] = self.count - before
        elif id(node) in self.sizes:
            self.count += self.sizes[id(node)]
        else:
            raise _Refused(event.start_mark, f"*{event.anchor}", "an alias of something that it is not a part of")
        if self.count > MOST_VALUES:
            wanted = f"at most {MOST_VALUES} values, with aliases written out"
            raise _Refused(event.start_mark, "more of them", wanted)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == MERGE:
                continue
            if key.tag != TAG + "str":
                got = key.value if isinstance(key, yaml.ScalarNode) else key.id
                raise _Refused(key.start_mark, got, "a text as key", f"Quote it: '{got}'.")
            line = key.start_mark.line + 1
            if key.value in first:
                got = f"the key {key.value!r} here and on line {first[key.value]}"
                raise _Refused(key.start_mark, got, "each key once", "Remove one of the two.")
            first[key.value] = line
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if not str(value).isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise _Refused(node.start_mark, value, "characters, not half of a surrogate pair")
        return value

    def _integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        digits = text.lstrip("+-").lstrip("0")
        value = LARGEST if len(digits) > 70 else int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if abs(value) >= LARGEST:
            raise _Refused(node.start_mark, _short(text), "an integer of 64 bits")
        return value

    def _float(self, node: yaml.ScalarNode) -> float:
        text = str(self.construct_scalar(node))
        value = float(text.replace(".", "", 1) if text.lstrip("+-")[:2].lower() in (".i", ".n") else text)
        if math.isinf(value) and "i" not in text.lower():
            raise _Refused(node.start_mark, _short(text), "a number below 1.8e308", "Infinity is written .inf.")
        return value


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else; writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def _text(self, data: str) -> yaml.ScalarNode:
        """Escape the line ends of Unicode, which a reader of plain and single-quoted texts makes blanks of."""
        return self.represent_scalar(
            "tag:yaml.org,2002:str", data, '"' if set(data) & set("\x85\u2028\u2029") else None
        )


for _kind in (_Loader, _Dumper):
    for _tag, _pattern, _first in CORE_SCHEMA:
        _starts: list[Any] = [*_first, *([""] if _tag == "null" else [])]
        _kind.add_implicit_resolver(TAG + _tag, re.compile(rf"^(?:{_pattern})$"), _starts)
_Loader.add_implicit_resolver(MERGE, re.compile(r"^<<$"), ["<"])
_Loader.add_constructor(TAG + "int", _Loader._integer)
_Loader.add_constructor(TAG + "float", _Loader._float)
_Dumper.add_representer(str, _Dumper._text)


@dataclasses.dataclass(frozen=True)
class Document:
    """A mapping read from YAML, and the line on which each key stands, by the keys that lead to it."""

    name: str
    data: dict[str, Any]
    lines: Mapping[tuple[str, ...], int]

    def place(self, path: tuple[str, ...]) -> str:
        """Where a key was written, in words: ``gsm8k.yaml, line 7``."""
        return f"{self.name}, line {self.lines[path]}" if path in self.lines else self.name


def read_mapping(text: str, name: str) -> Document:
    """Parse YAML whose top level must be a mapping with text keys.

    Args:
        text: the YAML.
        name: what errors call it, usually the path.

    Raises:
        OptionError: a syntax error, a key that stands twice or is no text, a tag, a number out of range, too many or
            too deeply nested values, another kind of top level; with the line.
    """
    if len(text) > MOST_CHARACTERS:
        line = text.count("\n", 0, MOST_CHARACTERS) + 1
        raise OptionError(f"{name}, line {line}", f"{len(text)} characters", f"at most {MOST_CHARACTERS} in all")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = None if node is None else loader.construct_document(node)
    except _Refused as error:
        raise OptionError(f"{name}, line {error.line}", error.got, error.wanted, error.way_out) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}, line {mark.line + 1}" if mark else name
        raise OptionError(place, error.problem or error.context, "valid YAML", "Correct that line.") from None
    except yaml.reader.ReaderError as error:
        place = f"{name}, line {text.count(chr(10), 0, error.position) + 1}"
        raise OptionError(place, repr(text[error.position]), "valid YAML", "It has no such character.") from None
    except ValueError as error:  # an escape such as "\U00110000" that stands for no character
        raise OptionError(f"{name}, line {loader.line + 1}", str(error), "valid YAML", "Correct that line.") from None
    if not isinstance(data, dict):
        got = "nothing" if data is None else type(data).__name__
        raise OptionError(name, got, "a mapping of settings", "Write lines such as 'learning_rate: 1e-4'.")
    assert node is not None, "a mapping has a node"
    lines: dict[tuple[str, ...], int] = {}
    _collect_lines(node, (), lines)
    return Document(name, data, lines)


def parse_value(text: str) -> Any:
    """Read the text after ``key=``: a YAML 1.2 scalar, or a flow list, a flow mapping, a quoted text.

    A text that opens like one of those and is none (``[qk]_proj$``) is that text.
    """
    stripped = text.strip()
    try:
        if stripped[:1] in ("[", "{", '"', "'"):
            return _Loader(stripped).get_single_data()
        loader = _Loader("")
        tag = loader.resolve(yaml.ScalarNode, stripped, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, stripped))
    except (yaml.YAMLError, ValueError):
        return text


def dump(data: Mapping[str, Any]) -> str:
    """Write a mapping as block YAML in its own order; ``read_mapping`` gives back an equal one."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _short(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:27]}..."


def _collect_lines(node: yaml.Node, above: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*above, key.value)
            lines[path] = key.start_mark.line + 1
            _collect_lines(value, path, lines)
