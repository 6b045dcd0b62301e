"""A JSON schema of the YAML, made of the declarations of the settings, for editors that check and complete files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from galore_trainer.fields import default_of
from galore_trainer.run.settings.keys import ALIASES, TRL_HINTS, training_hints
from galore_trainer.run.settings.knobs import field_help
from galore_trainer.run.settings.methods import METHODS
from galore_trainer.run.settings.ranges import RANGES
from galore_trainer.run.settings.run_config import BLOCKS, OWN, RunConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCALARS: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
}
# of a range: the numbers tried and the keyword of the bound that they show
LOWER_BOUNDS: tuple[tuple[float, dict[str, Any]], ...] = (
    (-1.0, {}),
    (0.0, {"minimum": 0}),
    (1e-9, {"exclusiveMinimum": 0}),
    (1.0, {"minimum": 1}),
)


def json_schema() -> dict[str, Any]:
    """The schema of a configuration: types, choices, minima, defaults and descriptions of every key."""
    own = _fields(RunConfig, OWN)
    aliases = {alias: {**own[key], "description": f"Another name of {key}."} for alias, key in ALIASES.items()}
    top = {**own, **aliases, **_trainer_fields()}
    blocks = {name: _object(_fields(cls)) for name, cls in BLOCKS.items()}
    everything = _with_blocks({key: value for key, value in top.items() if key != "method"}, blocks)
    methods = {name: {"$ref": "#/$defs/settings"} for name in METHODS}
    description = "Settings of single methods, above those of the file."
    whole = _with_blocks(top, blocks)
    whole["properties"]["methods"] = {**_object(methods), "type": ["object", "null"], "description": description}
    whole["patternProperties"] |= {rf"^methods\.({'|'.join(METHODS)})(\.|$)": {}}
    return {
        "$schema": DIALECT,
        "title": "galore-ft",
        "description": "A run of galore-ft train.",
        **whole,
        "$defs": {**blocks, "settings": {**everything, "type": ["object", "null"]}},
    }


def type_schema(hint: Any) -> dict[str, Any]:
    """The schema of an annotation: scalars, ``Literal``, lists, dictionaries, and unions of them."""
    if hint in SCALARS:
        return SCALARS[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": type_schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": type_schema(arguments[1]) or True}
    if not arguments:
        return {}
    parts = [type_schema(argument) for argument in arguments]
    if all(set(part) == {"type"} for part in parts):
        return {"type": [part["type"] for part in parts]}
    return {"anyOf": parts}


def _fields(cls: type, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    hints = get_type_hints(cls)
    properties = {}
    for field in dataclasses.fields(cls):
        if names is None or field.name in names:
            low = field.metadata.get("minimum")
            properties[field.name] = {
                **type_schema(hints[field.name]),
                **({} if low is None else {"minimum": low}),
                **_default(field),
                "description": field_help(field),
            }
    return properties


def _trainer_fields() -> dict[str, Any]:
    """The fields of ``transformers.TrainingArguments`` and of TRL's; their defaults depend on the version."""
    from transformers import TrainingArguments

    help_of = {field.name: field.metadata.get("help") for field in dataclasses.fields(TrainingArguments)}
    properties = {}
    for name, hint in {**training_hints(), **TRL_HINTS}.items():
        what = "A field of trl.SFTConfig, under 'trainer: trl'." if name in TRL_HINTS else help_of.get(name)
        properties[name] = {
            **type_schema(hint),
            **_lower_bound(name),
            "description": what or "A field of transformers.TrainingArguments.",
        }
    return properties


def _lower_bound(name: str) -> dict[str, Any]:
    """The smallest number that the range of a trainer's field allows, found by trial."""
    if name not in RANGES:
        return {}
    allowed = RANGES[name].allows
    return next((bound for number, bound in LOWER_BOUNDS if allowed(number)), {})


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    return {} if "shown_default" in field.metadata else {"default": default_of(field)}


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _with_blocks(properties: Mapping[str, Any], blocks: Mapping[str, Any]) -> dict[str, Any]:
    """An object with its own keys, the blocks, which may be empty, and the dotted keys that stand for their parts."""
    nested = {name: {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]} for name in blocks}
    dotted = {
        rf"^{re.escape(f'{name}.{key}')}$": {"$ref": f"#/$defs/{name}/properties/{key}"}
        for name, block in blocks.items()
        for key in block["properties"]
    }
    return {**_object({**properties, **nested}), "patternProperties": dotted}
