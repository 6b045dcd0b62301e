"""YAML as people write it: 1.2 scalars (``1e-4`` is a number, ``on`` a text), no key twice, errors with their line."""

from __future__ import annotations

import dataclasses
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


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2; it refuses a key that stands twice in one mapping."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                problem = f"the key {key.value!r} stands here and on line {first[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            first[key.value] = line
        return super().construct_mapping(node, deep=deep)

    def _integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else; writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in (_Loader, _Dumper):
    for _tag, _pattern, _first in CORE_SCHEMA:
        _starts: list[Any] = [*_first, *([""] if _tag == "null" else [])]
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _starts)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader._integer)


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
        OptionError: a syntax error, a key that stands twice, another kind of top level; with the line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}, line {mark.line + 1}" if mark else name
        raise OptionError(place, error.problem or error.context, "valid YAML", "Correct that line.") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML forbids; a date or number out of range
        raise OptionError(name, str(error).splitlines()[0], "valid YAML") from None
    if not isinstance(data, dict):
        got = "nothing" if data is None else type(data).__name__
        raise OptionError(name, got, "a mapping of settings", "Write lines such as 'learning_rate: 1e-4'.")
    assert node is not None, "a mapping has a node"
    lines: dict[tuple[str, ...], int] = {}
    _collect_lines(node, (), lines)
    _check_keys(data, name)
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


def _collect_lines(node: yaml.Node, above: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*above, key.value)
            lines[path] = key.start_mark.line + 1
            _collect_lines(value, path, lines)


def _check_keys(data: Mapping[Any, Any], name: str) -> None:
    for key, value in data.items():
        if not isinstance(key, str):
            raise OptionError(name, key, "a text as key", f"Quote it: '{key}'.")
        if isinstance(value, Mapping):
            _check_keys(value, name)
