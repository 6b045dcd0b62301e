"""Configurations of LLaMA-Factory, axolotl, TRL and transformers as our own, with a report on every key."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from galore_trainer.errors import OptionError
from galore_trainer.recipes.base import OF_A_SOURCE
from galore_trainer.run.settings.convert_rules import Kind, Rule, Tool, Untranslatable, as_here, none, to
from galore_trainer.run.settings.convert_tables import TOOLS, recognise
from galore_trainer.run.settings.keys import REFUSED
from galore_trainer.run.settings.run_config import RunConfig, known_keys, own_keys, read_config
from galore_trainer.run.settings.yaml_io import Document, dump, parse_value

VALUE = "{value}"
"""Stands for the value in the settings of a rule."""
TO_BE_WRITTEN = {"model_name_or_path": "path/to/model", "data.source": "path/to/train.jsonl"}
"""What stands for the model and the data where a file names none, so that no run takes the defaults unasked."""
SECRETS = ("hub_token", "api_key", "secret", "webhook_url")
"""Endings of keys whose values are not shown."""
OLD_BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}
"""Texts that are true or false in YAML 1.1, which other programs read."""
CHOICE = " --from NAME says whose it is."
NUMBER = re.compile(r"\[(\d+)\]")
"""The number of a further entry of a list, from 2, in a key."""
ENTRY = re.compile(r"data\.sources\[(\d+)\]\.(\w+)")
TITLES: dict[Kind, str] = {
    "mapped": "mapped",
    "changed": "changed in meaning, or to be done by hand",
    "missing": "no counterpart",
}


@dataclasses.dataclass(kw_only=True)
class Line:
    """What became of one key.

    Attributes:
        key: dotted, as in the file; empty for a default of the program that is written out.
        value: as in the file.
        kind: mapped, changed or missing.
        settings: ours, by dotted key.
        note: why, or what changes.
        entry: number, from 0, of the entry of ``data.sources`` that it would belong to.
        part: what it sets there, where there are several.
    """

    key: str
    value: Any
    kind: Kind
    settings: dict[str, Any]
    note: str
    entry: int = 0
    part: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        value = "..." if self.key.endswith(SECRETS) else _shown(self.value)
        left = f"{self.key}: {value}" if self.key else "(not written)"
        same = self.settings == {self.key: self.value}
        shown = dict(self.settings)
        if self.part and shown.pop("data.sources", None):
            shown |= {f"data.sources[{self.entry}].{name}": value for name, value in self.part.items()}
        right = "" if same else ", ".join(f"{key}: {_shown(value)}" for key, value in shown.items())
        return f"{left}{f' -> {right}' if right else ''}{f'  ({self.note})' if self.note else ''}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """A converted file.

    Attributes:
        tool: the program whose file it is.
        text: our YAML.
        lines: what became of each key, in the file's order, and of defaults.
    """

    tool: str
    text: str
    lines: list[Line]

    def count(self, kind: Kind) -> int:
        """Number of keys of this kind; written-out defaults do not count."""
        return sum(line.kind == kind and bool(line.key) for line in self.lines)

    def report(self, name: str) -> str:
        """Every key in words, kind by kind."""
        counts = ", ".join(f"{self.count(kind)} {title}" for kind, title in TITLES.items())
        parts = [f"{name} is a file of {self.tool}: {counts}."]
        for kind, title in TITLES.items():
            lines = [f"  {line}" for line in self.lines if line.kind == kind]
            parts += [f"{title}:", *lines] if lines else []
        return "\n".join(parts)


def convert(file: str, program: str | None = None) -> Conversion:
    """Translate a file; the result is valid for ``load_run_config``.

    Args:
        file: path of a YAML file.
        program: whose it is; None tells it by its keys.

    Raises:
        OptionError: a file that cannot be read, that is ours already, or that is nobody's.
    """
    document = read_config(file)
    tool = _tool(document, program)
    flat = dict(_flatten(document.data, tool.rules))
    lines = {key: _translate(key, value, flat, tool.rules) for key, value in flat.items()}
    if not any(line.settings for line in lines.values()):
        raise _nobodys(document, "" if program else CHOICE)
    _join_sources(lines)
    order = {key: number for number, key in enumerate(tool.rules)}
    settings: dict[str, Any] = {}
    for line in sorted(lines.values(), key=lambda line: order.get(line.key, -1)):
        settings |= line.settings
    defaults = _defaults(tool, settings)
    settings |= {key: value for line in defaults for key, value in line.settings.items()}
    _leave_out_refused(settings, [*lines.values(), *defaults])
    for line in lines.values():  # what a later rule overrode is shown as it is now
        optimizer = line.settings.get("method", "").startswith(("galore", "adamw_8bit"))
        if optimizer and settings["method"] in ("lora", "dora"):
            line.kind, line.note = "changed", "Adapters are trained with AdamW."
        line.settings = {key: settings[key] for key in line.settings if key in settings}
    head = f"# From a file of {tool.name}.\n"
    return Conversion(tool=tool.name, text=head + dump(_nested(settings)), lines=[*lines.values(), *defaults])


def _tool(document: Document, program: str | None) -> Tool:
    names = [tool.name for tool in TOOLS]
    if program is not None:
        for tool in TOOLS:
            if tool.name.lower() == program.lower():
                return tool
        raise OptionError("--from", program, f"one of {', '.join(names)}")
    if recognised := recognise(document.data, known_keys()):
        return recognised
    try:
        RunConfig.from_dict(document.data)
    except OptionError:
        pass
    else:
        wanted = "a file of another program"
        way_out = f"'galore-ft train {document.name}' takes it as it is."
        raise OptionError(document.name, "a configuration of galore-ft", wanted, way_out)
    raise _nobodys(document, CHOICE)


def _nobodys(document: Document, choice: str) -> OptionError:
    """The error for a file of no known program: what it looks like and what is missing."""
    names, keys = [tool.name for tool in TOOLS], list(document.data)
    nearest = max(TOOLS, key=lambda tool: len(set(tool.typical) & set(keys)))
    has, lacks = ([key for key in nearest.typical if (key in keys) == here] for here in (True, False))
    looks = f"It looks most like one of {nearest.name}, as it has {', '.join(has)}; it lacks {', '.join(lacks)}."
    known = [key for key in keys if key in known_keys()]
    if not has:
        typical = "; ".join(f"{tool.name}: {', '.join(tool.typical)}" for tool in TOOLS)
        looks = f"It has none of the keys that their files have ({typical})."
    ours = f" Keys of galore-ft in it: {', '.join(known)}." if known else ""
    got = f"keys such as {', '.join(keys[:5])}" if keys else "no keys"
    return OptionError(document.name, got, f"a file of {', '.join(names)}", f"{looks}{ours}{choice}")


def _flatten(data: Mapping[str, Any], rules: Mapping[str, Rule], above: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values; what a table knows the parts of is taken apart, a list of them into ``key``, ``key[2]``, ..."""
    for name, value in data.items():
        key = f"{above}{name}"
        if isinstance(value, str) and not name.endswith("strategy"):
            value = OLD_BOOLEANS.get(value.lower(), value)
        has_parts = any(rule.startswith(f"{key}.") for rule in rules)
        if has_parts and isinstance(value, str) and "=" in value:  # optim_args: "rank=64, scale=0.25"
            pairs = (part.partition("=") for part in value.split(","))
            value = {left.strip(): parse_value(right) for left, _, right in pairs}
        if has_parts and isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, entry in enumerate(value, start=1):
                name = key if number == 1 else f"{key}[{number}]"
                if isinstance(entry, Mapping):
                    yield from ((f"{name}{part[len(key) :]}", v) for part, v in _flatten(entry, rules, f"{key}."))
                else:
                    yield name, entry
        elif has_parts and isinstance(value, Mapping) and value:
            yield from _flatten(value, rules, f"{key}.")
        elif key in rules and rules[key].commas and (entries := _entries(value)):
            yield from ((f"{key}[{number}]" if number > 1 else key, v) for number, v in enumerate(entries, start=1))
        else:
            yield key, value


def _entries(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [part.strip() for part in value.split(",")] if isinstance(value, str) and value else []


def _translate(key: str, value: Any, file: Mapping[str, Any], rules: Mapping[str, Rule]) -> Line:
    rule = _rule(key, value, rules)
    settings = {name: value if sets == VALUE else sets for name, sets in rule.sets.items()}
    for name, sets in settings.items():
        if isinstance(sets, dict):
            settings[name] = {part: value if inner == VALUE else inner for part, inner in sets.items()}
    kind, note = rule.kind, rule.note
    if rule.key is not None:
        try:
            settings[rule.key] = rule.value(value, file) if rule.value else value
        except Untranslatable as error:
            settings, kind, note = {}, "missing", str(error)
    part = {name.removeprefix("data."): v for name, v in settings.items() if name.removeprefix("data.") in OF_A_SOURCE}
    if rule.entry:
        try:
            part[rule.entry] = rule.value(value, file) if rule.value else value
        except Untranslatable as error:
            kind, note = "missing", str(error)
    number = NUMBER.search(key)
    return Line(
        key=key,
        value=value,
        kind=kind,
        settings=settings,
        note=note,
        entry=int(number[1]) - 1 if number else 0,
        part=part,
    )


def _join_sources(lines: Mapping[str, Line]) -> None:
    """Where a file has several sources, let the lines about them set ``data.sources`` together."""
    several = {_base(key) for key, line in lines.items() if line.entry and "source" in line.part}
    lists = tuple(base.removesuffix(".path").removesuffix(".id") for base in several)
    if not several:
        return
    members = [
        line for key, line in lines.items() if line.part and (_base(key).startswith(lists) or "weight" in line.part)
    ]
    entries: dict[int, dict[str, Any]] = {}
    for line in members:
        entries.setdefault(line.entry, {}).update(line.part)
    named = [number for number in sorted(entries) if "source" in entries[number]]
    for line in members:
        line.entry = named.index(line.entry) if line.entry in named else -1
        rest = {k: v for k, v in line.settings.items() if k.removeprefix("data.") not in OF_A_SOURCE}
        line.settings = rest | {"data.sources": [entries[number] for number in named]}


def _base(key: str) -> str:
    """A key without the number of its entry."""
    return NUMBER.sub("", key)


def _rule(key: str, value: Any, rules: Mapping[str, Rule]) -> Rule:
    if value is None or value in ("", [], {}):
        return as_here("empty")
    further, key = NUMBER.search(key) is not None, _base(key)
    if key in rules:
        rule = rules[key]
        if further and str(rule.key).startswith("data.eval"):
            return none("One evaluation source is read: put all rows into one file.")
        hashable = isinstance(value, str | int | float | bool)
        return rule.cases[value] if hashable and value in rule.cases else rule
    if key in known_keys() and "." not in key:
        return to(key)
    if value is False:
        return as_here("off")
    for table, _ in REFUSED:
        if key in table:
            return none(table[key].format(value=_shown(value)))
    return none("galore-ft has no such setting.")


def _defaults(tool: Tool, settings: Mapping[str, Any]) -> list[Line]:
    """What the program does where the file says nothing, and this project would do otherwise or cannot guess."""
    method = settings.get("method", tool.defaults.get("method"))
    defaults = dict(tool.defaults)
    if method in ("galore", "galore_plus"):
        defaults |= tool.galore_defaults
    if method in ("lora", "dora"):
        defaults |= tool.lora_defaults
    written = {key: value(settings) if callable(value) else value for key, value in defaults.items()}
    note = f"the default of {tool.name}"
    lines = [(key, value, note) for key, value in written.items()]
    lines += [
        (key, value, "The file names none: write yours.")
        for key, value in TO_BE_WRITTEN.items()
        if f"{key}s" not in settings
    ]
    return [
        Line(key="", value=None, kind="changed", settings={key: value}, note=note)
        for key, value, note in lines
        if key not in settings
    ]


def _leave_out_refused(settings: dict[str, Any], lines: list[Line]) -> None:
    """Remove what our reader refuses, until it takes the rest; the lines say why.

    Raises:
        OptionError: a refusal of something that no line set.
    """
    while True:
        try:
            RunConfig.from_dict(_nested(settings))
            return
        except OptionError as error:
            if place := ENTRY.fullmatch(error.option):
                _leave_out_of_entry(settings, lines, int(place[1]), place[2], error)
                continue
            if error.option not in settings:
                raise
            if settings[error.option] != TO_BE_WRITTEN.get(error.option, settings[error.option]):
                settings[error.option] = TO_BE_WRITTEN[error.option]
            else:
                del settings[error.option]
            for line in lines:
                if error.option in line.settings:
                    line.kind, line.note = (
                        "missing",
                        f"{error.option}: wanted {error.wanted}. {error.way_out.removesuffix('(settings)')}".strip(),
                    )


def _leave_out_of_entry(
    settings: dict[str, Any], lines: list[Line], number: int, name: str, error: OptionError
) -> None:
    settings["data.sources"][number].pop(name)
    for line in lines:
        if line.entry == number and name in line.part:
            line.kind, line.note = "missing", f"{error.option}: wanted {error.wanted}. {error.way_out}".strip()


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as in YAML: our own keys, the trainer's, then the blocks, in the order of their declaration."""
    order = {key: number for number, key in enumerate(own_keys())}
    data: dict[str, Any] = {}
    for key in sorted(settings, key=lambda key: ("." in key, order.get(key, len(order)))):
        block, _, name = key.rpartition(".")
        (data.setdefault(block, {}) if block else data)[name] = settings[key]
    return data


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
