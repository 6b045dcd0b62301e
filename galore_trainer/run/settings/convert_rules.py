"""What becomes of a key of another program's configuration: the forms in which the converter's tables are written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

from galore_trainer.run.settings.keys import modules_in_our_words

Kind = Literal["mapped", "changed", "missing"]
File = Mapping[str, Any]
"""All keys of a file, dotted."""
Value = Callable[[Any, File], Any]
"""From a value and its file to our value; it may raise ``Untranslatable``."""
FILES = (".json", ".jsonl", ".csv", ".parquet")


class Untranslatable(Exception):
    """A value without a counterpart; its message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What one key becomes.

    Attributes:
        kind: mapped as it is, mapped with another meaning, or without a counterpart.
        note: why, or what changes; empty where nothing is to be said.
        key: our dotted key for the value; None where the value goes nowhere.
        value: makes our value; None takes it as it is.
        sets: our settings, whatever the value is; ``{value}`` as a value stands for it.
        cases: the rule of single values, in place of this one.
        commas: the value is a list with commas, one part for each entry of ``data.sources``.
        entry: the setting of an entry of ``data.sources`` where there are several; nothing where there is one.
    """

    kind: Kind
    note: str = ""
    key: str | None = None
    value: Value | None = None
    sets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cases: Mapping[Any, Rule] = dataclasses.field(default_factory=dict)
    commas: bool = False
    entry: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tool:
    """A program whose configurations are converted.

    Attributes:
        name: as its authors write it.
        rules: by dotted key; a later rule overrides what an earlier one sets.
        typical: keys that most of its files have, for the error about a file of nobody's.
        defaults: what it does where nothing is written and this project does otherwise: our key to its value, or to a
            function of the settings that makes it.
        galore_defaults: the same where the file asks for GaLore.
        lora_defaults: the same where the file asks for adapters.
    """

    name: str
    rules: Mapping[str, Rule]
    typical: tuple[str, ...]
    defaults: Mapping[str, Any]
    galore_defaults: Mapping[str, Any]
    lora_defaults: Mapping[str, Any]


def to(key: str, note: str = "", value: Value | None = None, commas: bool = False) -> Rule:
    """The value goes to our ``key``; with a note its meaning changes."""
    return Rule(kind="changed" if note else "mapped", note=note, key=key, value=value, commas=commas)


def sets(settings: Mapping[str, Any], note: str = "") -> Rule:
    """The key stands for these settings; with a note its meaning changes."""
    return Rule(kind="changed" if note else "mapped", note=note, sets=settings)


def as_here(note: str = "") -> Rule:
    """Nothing is to be written: it is so here."""
    return Rule(kind="mapped", note=note)


def by_hand(note: str) -> Rule:
    """Nothing can be written, but there is a way to the same."""
    return Rule(kind="changed", note=note)


def none(note: str) -> Rule:
    """There is no counterpart."""
    return Rule(kind="missing", note=note)


def case(cases: Mapping[Any, Rule], other: Rule) -> Rule:
    """The rule of the value; ``other`` for any other value."""
    return dataclasses.replace(other, cases=cases)


def when(rule: Rule) -> Rule:
    """A switch: ``rule`` where it is on."""
    return case({False: as_here("off, as here")}, rule)


# ------------------------------------------------------------------------------------------ values


def modules(value: Any, _: File) -> Any:
    """A choice of modules in our words."""
    return modules_in_our_words(value)


def source(value: Any, _: File) -> str:
    """A path or hub id as it is; a registered name as the path of a file that is to be put there."""
    text = next(iter(value)) if isinstance(value, Mapping) and value else str(value)
    is_source = text.count("/") == 1 or text.endswith(FILES)
    return text if is_source else f"path/to/{PurePosixPath(text).name or 'train'}.jsonl"


def mixer(value: Any, file: File) -> list[dict[str, str]]:
    """The names of a mapping as sources."""
    if not isinstance(value, Mapping) or not value:
        raise Untranslatable("It is no mapping of data sets.")
    return [{"source": source(name, file)} for name in value]


def column(name: str) -> Value:
    """A column of the file as the one that is called ``name`` here."""

    def renamed(value: Any, _: File) -> dict[str, str]:
        if not isinstance(value, str):
            raise Untranslatable("It is no name of a column.")
        return {name: value}

    return renamed


def number(value: Any, _: File) -> float:
    """A number above 0, also as a text."""
    try:
        if not isinstance(value, bool) and 0 < float(value) < math.inf:
            return value if isinstance(value, int | float) else float(value)
    except (TypeError, ValueError):
        pass
    raise Untranslatable("It is no number above 0.")


def assistant_alone(value: Any, _: File) -> str:
    """The roles that are trained on, where they are the assistant's."""
    roles = [value] if isinstance(value, str) else value
    if isinstance(roles, list) and roles and all(role in ("assistant", "gpt", "model") for role in roles):
        return "all"
    raise Untranslatable("The loss is on the assistant's turns alone.")


def held_out(value: Any, _: File) -> int:
    """A number of held-out examples; a share has no counterpart."""
    if isinstance(value, int | float) and not isinstance(value, bool) and (value == 0 or value >= 1):
        return int(value)
    raise Untranslatable("A share: write the number of examples as data.eval_samples (200 unless written).")


def share_of_steps(value: Any, file: File) -> Any:
    """Times an epoch as a share of all steps."""
    epochs = file.get("num_epochs") or 1
    if not all(isinstance(number, int | float) and number > 0 for number in (value, epochs)):
        raise Untranslatable("It or num_epochs is no number above 0.")
    share = 1 / (value * epochs)
    if share >= 1:
        raise Untranslatable("Less than once in the run.")
    return round(share, 6)


def inverted(value: Any, _: File) -> bool:
    """The opposite of a switch."""
    return not value


def twice_the_rank(value: Any, file: File) -> Any:
    """An alpha of LLaMA-Factory: 0 is twice the rank."""
    rank = file.get("lora_rank") or 8
    return value or (2 * rank if isinstance(rank, int) else rank)


# ------------------------------------------------------------------------------------------ rules of data

SEVERAL = "An entry of data.sources: path, name, split, columns, weight."
ROWS = "Columns tell the form of the rows; data.columns renames them."
WEIGHTS = Rule(kind="changed", note="Its share of the training examples, none twice.", entry="weight", value=number)
ANSWERS = "The loss is on the assistant's turns alone."
TEMPLATE = "The prompt's form is the chat template's."
TURNS = "Turns are {role, content} or {from, value}."
ENDS = "The end of each answer is trained on."

AXOLOTL_DATA: dict[str, Rule] = {
    "datasets.path": to("data.source", ROWS, source),
    "datasets.split": to("data.split"),
    "datasets.name": to("data.subset"),
    "datasets.revision": to("data.revision"),
    "datasets.type": case({
        "completion": sets({"data.task": "text"}), "chat_template": sets({"data.task": "sft"}),
        **{name: sets({"data.task": "sft"}, TEMPLATE) for name in ("alpaca", "sharegpt")},
    }, none(f"{TEMPLATE} {ROWS}")),
    "datasets.field": to("data.columns", value=column("text")),
    "datasets.field_messages": case(
        {name: as_here("told by the columns") for name in ("messages", "conversations")},
        to("data.columns", value=column("messages")),
    ),
    "test_datasets.path": to("data.eval_source", ROWS, source),
    "test_datasets.split": to("data.eval_split"),
    "test_datasets.type": as_here("as the training data"),
    **{f"{block}{name}": rule for block in ("datasets", "test_datasets") for name, rule in {
        "": none(SEVERAL),
        ".ds_type": as_here("told by the ending"),
        ".data_files": none("Write the file as data.source."),
        ".message_property_mappings.role": case({"role": as_here(), "from": as_here()}, none(TURNS)),
        ".message_property_mappings.content": case({"content": as_here(), "value": as_here()}, none(TURNS)),
        ".roles_to_train": to("data.train_on", value=assistant_alone),
        ".train_on_eos": case({"turn": as_here(ENDS)}, none(ENDS)),
    }.items()},
}  # fmt: skip

TRL_DATA: dict[str, Rule] = {
    **{f"{block}.{name}": rule for block in ("datasets", "dataset_mixture.datasets") for name, rule in {
        "path": to("data.source", value=source), "id": to("data.source", value=source), "name": to("data.subset"),
        "config": to("data.subset"), "split": to("data.split"), "columns": as_here("others are not read"),
        "data_files": none("Write the file as data.source."), "weight": WEIGHTS,
    }.items()},
    "datasets": none(SEVERAL),
    "dataset_mixture.datasets": none(SEVERAL),
}  # fmt: skip
