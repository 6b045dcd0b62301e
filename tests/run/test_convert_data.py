"""Data of other programs' files: several sources, what is trained on, packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from galore_trainer.run.settings.convert import Conversion, convert
from galore_trainer.run.settings.run_config import RunConfig, load_run_config

AXOLOTL = {"base_model": "a/b", "sequence_len": 128, "micro_batch_size": 1}
FACTORY = {"model_name_or_path": "a/b", "stage": "sft", "finetuning_type": "full", "cutoff_len": 128}
TRL = {"model_name_or_path": "a/b", "max_length": 128, "use_peft": False}


def converted(data: dict[str, Any], folder: Path) -> tuple[RunConfig, Conversion]:
    (folder / "theirs.yaml").write_text(json.dumps(data))  # JSON is YAML
    conversion = convert(str(folder / "theirs.yaml"))
    (folder / "ours.yaml").write_text(conversion.text)
    return load_run_config(folder / "ours.yaml"), conversion


def kind_of(conversion: Conversion, key: str) -> str:
    return next(line.kind for line in conversion.lines if line.key == key)


def test_datasets_of_axolotl_are_sources_with_their_settings(tmp_path: Path) -> None:
    datasets = [
        {"path": "a/chats", "type": "chat_template", "split": "train", "roles_to_train": ["assistant"]},
        {"path": "data/texts.jsonl", "type": "completion", "field": "body"},
        {"path": "a/more", "name": "small", "type": "chat_template", "field_messages": "turns", "shards": 4},
    ]
    config, conversion = converted({**AXOLOTL, "datasets": datasets}, tmp_path)
    assert config.data.sources == [
        {"source": "a/chats", "task": "sft", "split": "train"},
        {"source": "data/texts.jsonl", "task": "text", "columns": {"text": "body"}},
        {"source": "a/more", "task": "sft", "subset": "small", "columns": {"messages": "turns"}},
    ]
    assert config.data.train_on == "all"
    assert kind_of(conversion, "datasets[3].shards") == "missing"
    assert "datasets[2].path: data/texts.jsonl -> data.sources[1].source: data/texts.jsonl" in conversion.report("x")


def test_one_data_set_is_one_source(tmp_path: Path) -> None:
    config, _ = converted({**AXOLOTL, "datasets": [{"path": "a/b", "type": "alpaca", "split": "test"}]}, tmp_path)
    assert (config.data.sources, config.data.source, config.data.split) == (None, "a/b", "test")


@pytest.mark.parametrize(
    ("more", "weights"),
    [({}, [None, None]), ({"mix_strategy": "interleave_under", "interleave_probs": "0.7,0.3"}, [0.7, 0.3])],
)
def test_names_with_commas_of_llama_factory_are_sources(more: dict, weights: list, tmp_path: Path) -> None:
    config, _ = converted({**FACTORY, "dataset": "identity,a/chats", **more}, tmp_path)
    expected = [{"source": "path/to/identity.jsonl"}, {"source": "a/chats"}]
    for entry, weight in zip(expected, weights, strict=True):
        entry.update({} if weight is None else {"weight": weight})
    assert config.data.sources == expected


def test_sources_of_trl_and_the_alignment_handbook(tmp_path: Path) -> None:
    for key in ("id", "path"):
        entries = [{key: "a/x", "weight": 1.0}, {key: "a/y", "config": "c", "weight": 0.5}]
        config, _ = converted({**TRL, "dataset_mixture": {"datasets": entries, "seed": 3}}, tmp_path)
        assert config.data.sources == [
            {"source": "a/x", "weight": 1.0},
            {"source": "a/y", "subset": "c", "weight": 0.5},
        ]
        assert config.data.split_seed == 3
    config, _ = converted({**TRL, "dataset_mixer": {"a/x": 1.0, "a/y": 0.5}}, tmp_path)
    assert config.data.sources == [{"source": "a/x"}, {"source": "a/y"}]


def test_what_an_entry_does_not_take_is_left_out_and_reported(tmp_path: Path) -> None:
    entries = [{"path": "a/x", "weight": 0}, {"path": "a/y", "split": 3}]
    config, conversion = converted({**TRL, "datasets": entries, "dataset_config": "c"}, tmp_path)
    assert config.data.sources == [{"source": "a/x"}, {"source": "a/y"}]
    assert config.data.subset is None
    for key in ("datasets.weight", "datasets[2].split", "dataset_config"):
        assert kind_of(conversion, key) == "missing"


def test_several_evaluation_sources_are_not_read(tmp_path: Path) -> None:
    more = {"test_datasets": [{"path": "a/x", "split": "test"}, {"path": "a/y", "split": "test"}]}
    config, conversion = converted({**AXOLOTL, "datasets": [{"path": "a/b"}], **more}, tmp_path)
    assert (config.data.eval_source, config.data.sources) == ("a/x", None)
    assert kind_of(conversion, "test_datasets[2].path") == "missing"


@pytest.mark.parametrize(
    ("data", "key", "kind", "expected"),
    [
        ({**AXOLOTL, "train_on_inputs": False}, "train_on_inputs", "mapped", {"train_on": "all"}),
        ({**AXOLOTL, "train_on_inputs": True}, "train_on_inputs", "missing", {}),
        (
            {**AXOLOTL, "datasets": [{"path": "a/b", "roles_to_train": ["user"]}]},
            "datasets.roles_to_train",
            "missing",
            {},
        ),
        ({**FACTORY, "mask_history": True}, "mask_history", "mapped", {"train_on": "last"}),
        ({**FACTORY, "mask_history": False}, "mask_history", "mapped", {"train_on": "all"}),
        ({**FACTORY, "stage": "pt"}, "stage", "mapped", {"task": "text"}),
        ({**FACTORY, "train_on_prompt": True}, "train_on_prompt", "missing", {}),
        ({**TRL, "assistant_only_loss": True}, "assistant_only_loss", "mapped", {"train_on": "all"}),
        ({**TRL, "dataset_text_field": "text"}, "dataset_text_field", "mapped", {"columns": {}}),
        ({**TRL, "dataset_text_field": "body"}, "dataset_text_field", "mapped", {"columns": {"text": "body"}}),
    ],
)
def test_what_is_trained_on(data: dict, key: str, kind: str, expected: dict[str, Any], tmp_path: Path) -> None:
    config, conversion = converted(data, tmp_path)
    assert kind_of(conversion, key) == kind
    assert {name: getattr(config.data, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("base", "key"), [(AXOLOTL, "sample_packing"), (FACTORY, "packing"), (FACTORY, "neat_packing"), (TRL, "packing")]
)
def test_packing_needs_no_other_trainer(base: dict, key: str, tmp_path: Path) -> None:
    config, conversion = converted({**base, key: True}, tmp_path)
    assert (config.packing, config.trainer) == (True, "hf")
    assert kind_of(conversion, key) == ("changed" if base is FACTORY and key == "packing" else "mapped")
