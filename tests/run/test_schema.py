"""The JSON schema holds every key once, takes every good configuration, and refuses what the reader refuses."""

from __future__ import annotations

import importlib.util
import json
import re
from typing import Any

import pytest

from galore_trainer.cli.main import main
from galore_trainer.run.settings.methods import METHODS
from galore_trainer.run.settings.run_config import known_keys, load_run_config, packaged_configs
from galore_trainer.run.settings.schema import json_schema
from galore_trainer.run.settings.yaml_io import read_mapping

SCHEMA = json_schema()
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": list,
         "null": type(None)}  # fmt: skip


def fits(value: Any, schema: Any) -> bool:
    """The keywords of JSON schema that ours uses."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        target: Any = SCHEMA
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return fits(value, target)
    kinds = schema.get("type", list(TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(
        isinstance(value, TYPES[kind]) and (kind not in ("integer", "number") or not isinstance(value, bool))
        for kind in kinds
    ):
        return False
    if "enum" in schema and not any(value == e and type(value) is type(e) for e in schema["enum"]):
        return False
    if "anyOf" in schema and not any(fits(value, part) for part in schema["anyOf"]):
        return False
    if isinstance(value, int | float) and not (
        value >= schema.get("minimum", value) and value > schema.get("exclusiveMinimum", float("-inf"))
    ):
        return False
    if isinstance(value, list):
        return all(fits(item, schema.get("items", True)) for item in value)
    if isinstance(value, dict):
        for key, item in value.items():
            parts = [schema["properties"][key]] if key in schema.get("properties", {}) else []
            parts += [part for pattern, part in schema.get("patternProperties", {}).items() if re.search(pattern, key)]
            if not all(fits(item, part) for part in parts or [schema.get("additionalProperties", True)]):
                return False
    return True


def is_valid(data: Any) -> bool:
    """By ``fits``, and by jsonschema where it is installed."""
    answer = fits(data, SCHEMA)
    if importlib.util.find_spec("jsonschema"):
        import jsonschema

        assert jsonschema.Draft202012Validator(SCHEMA).is_valid(data) == answer
    return answer


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(SCHEMA))
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    if importlib.util.find_spec("jsonschema"):
        import jsonschema

        jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_key_has_a_type_and_a_description() -> None:
    blocks = {name: block["properties"] for name, block in SCHEMA["$defs"].items() if name != "settings"}
    entries = {f"{name}.{key}": entry for name, block in blocks.items() for key, entry in block.items()}
    entries |= {key: entry for key, entry in SCHEMA["properties"].items() if key not in (*blocks, "methods")}
    assert set(entries) == set(known_keys())
    for key, entry in entries.items():
        assert entry["description"], key
        assert entry.keys() & {"type", "enum", "anyOf"}, key
    assert entries["galore.rank"] == {
        "type": "integer", "minimum": 1, "default": 32, "description": "Directions kept of each projected gradient.",
    }  # fmt: skip
    assert entries["method"]["enum"] == list(METHODS)
    assert entries["num_train_epochs"]["exclusiveMinimum"] == 0
    assert entries["gradient_accumulation_steps"]["minimum"] == 1


@pytest.mark.parametrize("name", packaged_configs())
def test_packaged_configurations_and_what_they_resolve_to_are_valid(name: str) -> None:
    assert is_valid(read_mapping(packaged_configs()[name], name).data)
    for method in METHODS:
        assert is_valid(load_run_config(name, [], {"method": method}).to_dict())


@pytest.mark.parametrize(
    "data",
    [
        {"galore.rank": 8, "eval": None, "galore": {}},
        {"methods": {"adamw": None, "galore_plus": {"galore": {"scale": 5}, "galore.update_proj_gap": 40}}},
        {"galore": {"target_modules": ["attn", "mlp"], "oversampling": None}},
        {"bf16": "auto", "report_to": ["wandb"], "warmup_steps": 0.1, "packing": True},
    ],
)
def test_what_the_reader_takes_is_valid(data: dict[str, Any]) -> None:
    assert is_valid(data)


@pytest.mark.parametrize(
    "data",
    [
        {"lerning_rate": 1},
        {"galore": {"rnak": 8}},
        {"galore": {"rank": 0}},
        {"galore.rank": 0},
        {"galore": 4},
        {"galore": {"svd": "Exact"}},
        {"galore": {"state_bits": 4}},
        {"galore": {"target_modules": 3}},
        {"method": "galor"},
        {"methods": {"foo": {}}},
        {"methods": {"adamw": {"method": "lora"}}},
        {"methods": {"adamw": {"galore": {"rank": 0}}}},
        {"max_steps": 1.5},
        {"gradient_accumulation_steps": 0},
        {"num_train_epochs": 0},
        {"eval": {"before": 1}},
    ],
)
def test_what_the_reader_refuses_is_not(data: dict[str, Any]) -> None:
    assert not is_valid(data)
