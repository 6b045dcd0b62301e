"""What a YAML file or a command line sets: dotted keys, values of the right type, and where each one was written."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from galore_trainer.config import check_type
from galore_trainer.errors import OptionError
from galore_trainer.run.settings.keys import ALIASES, coerce
from galore_trainer.run.settings.ranges import check_range
from galore_trainer.run.settings.yaml_io import Document, parse_value

_BLOCK = re.compile(r"(methods\.[^.]+\.)?(galore|lora|data|eval)|methods(\.[^.]+)?")
_METHOD = re.compile(r"methods\.[^.]+")
_PLACEHOLDER = re.compile(
    r"(\./)?path/to/.*|<[^<>]*>|\?\?\?|\.\.\.|((TODO|FIXME)\b|CHANGE[_ -]?ME|FILL[_ -]?(IN|ME)).*", re.DOTALL
)
"""What people, the packaged files and ``config convert`` write where a value is still to come."""
_FLAGS = {"model_name_or_path": "--model"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One value as the user wrote it.

    Args:
        key: dotted, for example ``galore.rank`` or ``methods.adamw.learning_rate``.
        value: what YAML made of it.
        place: where it was written: ``quickstart.yaml, line 7``, ``--rank 8``, ``galore.rank=8``.
        written: its characters where they came from a command line.
    """

    key: str
    value: Any
    place: str
    written: str | None = None


@dataclasses.dataclass
class Source:
    """What one file or one command line sets.

    Attributes:
        values: for every method, by dotted key.
        methods: {method: {dotted key: value}} for single methods.
        places: where each key was written.
        methodless: the error for each name under ``methods:`` that is no method.
        unknown: settings with unknown keys, by their key without the method's.
    """

    values: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    places: dict[str, str]
    methodless: dict[str, OptionError]
    unknown: list[tuple[str, Setting]]


def file_settings(document: Document) -> Iterator[Setting]:
    """The settings of a YAML file."""
    for path, value in _flatten(document.data):
        yield Setting(".".join(path), value, document.place(path))


def command_line_settings(overrides: Sequence[str], flags: Mapping[str, Any]) -> Iterator[Setting]:
    """The settings of ``key=value`` arguments, and of flags by dotted key.

    Raises:
        OptionError: an argument that is not ``key=value``.
    """
    for text in overrides:
        key, equals, written = text.partition("=")
        key = key.strip()
        if not equals or not key:
            way_out = f"Write {key or 'key'}={written or '...'}, or remove it."
            raise OptionError("argument", text, "key=value", way_out)
        for path, value in _flatten({key: parse_value(written)}):
            yield Setting(".".join(path), value, text, written if len(path) == 1 else None)
    for key, value in flags.items():
        written = str(value)
        parsed = parse_value(value) if isinstance(value, str) else value
        place = flag_name(key, negated=value is False)
        yield Setting(key, parsed, place if isinstance(value, bool) else f"{place} {written}", written)


def still_to_fill_in(settings: Iterable[Setting], hints: Mapping[str, Any]) -> list[Setting]:
    """The settings whose value is empty where one is needed, or only stands for one, as ``path/to/train.jsonl`` does.

    Args:
        settings: of one file.
        hints: the type of every key that is known.
    """
    return [
        dataclasses.replace(setting, key=key, value=value)
        for setting in settings
        for key, value in _leaves(setting.key, setting.value)
        if _is_placeholder(value) or (_is_empty(value) and _needs_value(key, hints))
    ]


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value, or those of a list and a mapping inside it: ``data.sources[1].source``."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _leaves(f"{key}[{number}]", item)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}", item)
    else:
        yield key, value


def _is_placeholder(value: Any) -> bool:
    if not isinstance(value, str) or _PLACEHOLDER.fullmatch(value.strip()) is None:
        return False
    return not Path(value).exists()


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _needs_value(key: str, hints: Mapping[str, Any]) -> bool:
    """Whether a setting is no setting without a value: none is not among those that it takes."""
    hint = hints.get(re.sub(rf"{_METHOD.pattern}\.", "", key))
    if hint is None:
        return False
    try:
        check_type(key, None, hint)
    except OptionError:
        return True
    return False


def flag_name(key: str, *, negated: bool = False) -> str:
    """The flag that stands for a dotted key: ``galore.rank`` is ``--rank``, ``lora.rank`` is ``--lora-rank``."""
    block, _, leaf = key.rpartition(".")
    leaf = f"{block}-{leaf}" if block == "lora" else leaf
    leaf = leaf.replace("_", "-")
    return _FLAGS.get(key, f"--no-{leaf}" if negated else f"--{leaf}")


def collect(settings: Iterable[Setting], hints: Mapping[str, Any], check_method: Callable[[str], Any]) -> Source:
    """Check and sort the settings of one source; where a name is unknown, values are neither checked nor kept.

    Args:
        settings: of one file or one command line.
        hints: the type of every key that is known.
        check_method: raises for a name under ``methods:`` that is no method.

    Raises:
        OptionError: a key that is set twice, or whose value is of another type.
    """
    source = Source({}, {}, {}, {}, [])
    checked: list[tuple[Setting, str, dict[str, Any]]] = []
    for setting in settings:
        if setting.key in source.places:
            both = f"{source.places[setting.key]} and {setting.place}"
            raise OptionError(setting.key, both, "one value", "Remove one of the two.")
        source.places[setting.key] = setting.place
        head, _, rest = setting.key.partition(".")
        if head == "methods":
            method, dot, key = rest.partition(".")
            try:
                check_method(method)
            except OptionError as error:
                source.methodless[method] = error
                continue
            if not dot:  # a method without settings of its own
                continue
            target = source.methods.setdefault(method, {})
        else:
            key, target = setting.key, source.values
        if key not in hints or (head == "methods" and key == "method"):
            source.unknown.append((key, setting))
        else:
            checked.append((setting, key, target))
    for setting, key, target in [] if source.unknown or source.methodless else checked:
        value = coerce(setting.key, setting.value, hints[key], written=setting.written, place=setting.place)
        check_range(key, value, option=setting.key, place=setting.place)
        name = ALIASES.get(key, key)
        if target.setdefault(name, value) != value:
            alias = next(alias for alias, meant in ALIASES.items() if meant == name)
            both = f"{value!r}, and {target[name]!r} for the other name"
            raise OptionError(f"{name} and {alias}", both, "one value", "They are one setting: remove one of the two.")
    return source


def _flatten(data: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in data.items():
        path = (*above, name)
        key = ".".join(path)
        empty = value is None or value == {}
        if not _BLOCK.fullmatch(key) or (
            empty and _METHOD.fullmatch(key)
        ):  # the name of an empty block is checked, too
            yield path, value
        elif isinstance(value, Mapping):
            yield from _flatten(value, path)
        elif value is not None:
            raise OptionError(key, value, "a mapping", f"Write '{key}.name={value}', or a block of names and values.")
