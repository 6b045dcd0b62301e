"""Tables of settings for the documentation, written from the dataclasses that declare them."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from galore_trainer.config import describe_type
from galore_trainer.fields import default_of, in_words
from galore_trainer.run.settings.run_config import BLOCKS


def knob_table(cls: type) -> str:
    """A Markdown table of one configuration class: key, default, what is accepted, what it does.

    Args:
        cls: ``GaLoreConfig``, ``DataConfig``, ``EvalConfig`` or ``RunConfig``; the keys are dotted as in YAML.
    """
    prefix = next((f"{name}." for name, block in BLOCKS.items() if block is cls), "")
    hints = get_type_hints(cls)
    rows = [
        (f"`{prefix}{field.name}`", f"`{show_default(field)}`", accepted(field, hints[field.name]), field_help(field))
        for field in dataclasses.fields(cls)
        if "help" in field.metadata
    ]
    lines = [("Key", "Default", "Accepted", "What it does"), ("---",) * 4, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def field_help(field: dataclasses.Field[Any]) -> str:
    """The sentence that was declared with a field, and the settings that give it an effect."""
    needed = in_words(field) if "only_with" in field.metadata else ""
    return f"{field.metadata['help']}{f' Only with {needed}.' if needed else ''}"


def show_default(field: dataclasses.Field[Any]) -> str:
    """A field's default as one would write it in YAML; ``unset`` for None."""
    if "shown_default" in field.metadata:
        return str(field.metadata["shown_default"])
    value = default_of(field)
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def accepted(field: dataclasses.Field[Any], hint: Any) -> str:
    """What a field accepts, in words: ``an integer, at least 1``."""
    low = field.metadata.get("minimum")
    return describe_type(hint) + (f", at least {low:g}" if low is not None else "")
