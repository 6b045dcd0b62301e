"""``knob``: how a setting is declared; and which settings have no effect beside the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any


def knob(
    default: Any, help: str, *, trajectory: bool = False, minimum: float | None = None, only_with: str = ""
) -> Any:
    """Declare one field: its default, its help, and whether changing it at resume would break the run.

    Args:
        default: value used when neither YAML nor a flag sets the field.
        help: one sentence, for the flag's help and ``docs/knobs.md``.
        trajectory: True where saved optimizer state is meaningless under another value; a resume refuses it then.
        minimum: smallest accepted number, checked by ``GaLoreConfig``.
        only_with: the fields of the class that give this one an effect, ``name: value, value; name``; one of them
            suffices, and without values any but 0 does. Empty where it always has an effect.
    """
    metadata = {"help": help, "trajectory": trajectory, "minimum": minimum, "only_with": only_with}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def idle_settings(block: str, config: Any) -> list[str]:
    """Sentences about the settings of a block that differ from their defaults and have no effect beside the others.

    A value of 0, or false, asks for nothing and is never named.

    Args:
        block: the name of the block, for dotted keys.
        config: an instance whose fields were declared with ``knob``.
    """
    sentences = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not value or value == default_of(field) or has_effect(field, config):
            continue
        present = " and ".join(f"{block}.{name} {_in_force(config, name)}" for name, _ in requirements(field))
        needed = in_words(field, f"{block}.")
        sentences.append(f"{block}.{field.name} {_text(value)} has no effect beside {present}: it needs {needed}")
    return sentences


def has_effect(field: dataclasses.Field[Any], config: Any) -> bool:
    """Whether one of the settings that give a field its effect is in force."""
    needed = list(requirements(field))
    return not needed or any(
        _in_force(config, name) in values if values else bool(getattr(config, name)) for name, values in needed
    )


def requirements(field: dataclasses.Field[Any]) -> Iterator[tuple[str, list[str]]]:
    """Names and values of the settings that give a field its effect; nothing for one that always has it."""
    for alternative in filter(None, field.metadata.get("only_with", "").split(";")):
        name, colon, values = alternative.partition(":")
        yield name.strip(), [value.strip() for value in values.split(",")] if colon else []


def in_words(field: dataclasses.Field[Any], prefix: str = "") -> str:
    """``requirements`` as one text, for example ``residual: sparse or both``; ``prefix`` stands before each name."""
    return ", or ".join(
        f"{prefix}{name}" + (f": {' or '.join(values)}" if values else "") for name, values in requirements(field)
    )


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The declared default of a field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _in_force(config: Any, name: str) -> str:
    """A setting in words; what ``auto`` stands for where the class resolves it."""
    return _text(getattr(config, f"resolved_{name}", getattr(config, name)))


def _text(value: Any) -> str:
    """A value as YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
