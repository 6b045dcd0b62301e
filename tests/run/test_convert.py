"""Configurations of other programs become ours: every key is reported, and our own reader takes the result."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from galore_trainer.cli.main import main
from galore_trainer.errors import OptionError
from galore_trainer.run.settings.convert import Conversion, Line, convert
from galore_trainer.run.settings.convert_rules import Tool
from galore_trainer.run.settings.convert_tables import TOOLS, TRL
from galore_trainer.run.settings.run_config import RunConfig, known_keys, load_run_config
from galore_trainer.run.settings.yaml_io import dump

PEERS = Path(__file__).parents[1] / "fixtures" / "peers"
# file -> whose it is; keys that are mapped, that change their meaning, that have no counterpart
COUNTS = {
    "axolotl_chat": ("axolotl", 32, 10, 4),
    "axolotl_galore": ("axolotl", 29, 8, 6),
    "axolotl_lora": ("axolotl", 22, 7, 3),
    "llama_factory_full": ("LLaMA-Factory", 23, 6, 2),
    "llama_factory_galore": ("LLaMA-Factory", 20, 9, 3),
    "llama_factory_lora": ("LLaMA-Factory", 21, 4, 4),
    "transformers_galore": ("transformers", 10, 3, 0),
    "transformers_layerwise": ("transformers", 18, 4, 2),
    "transformers_script": ("transformers", 13, 4, 5),
    "trl_lora": ("TRL", 19, 4, 2),
    "trl_mixture": ("TRL", 35, 5, 4),
    "trl_sft": ("TRL", 20, 4, 1),
}


def line_of(conversion: Conversion, key: str) -> Line:
    return next(line for line in conversion.lines if line.key == key)


def converted(text: str, folder: Path, program: str | None = None) -> tuple[RunConfig, Conversion]:
    file = folder / "theirs.yaml"
    file.write_text(text)
    conversion = convert(str(file), program)
    (folder / "ours.yaml").write_text(conversion.text)
    return load_run_config(folder / "ours.yaml"), conversion


def test_there_are_three_files_of_each_program() -> None:
    assert {path.stem for path in PEERS.glob("*.yaml")} == set(COUNTS)
    assert sorted(counts[0] for counts in COUNTS.values()) == sorted(tool.name for tool in TOOLS for _ in range(3))


@pytest.mark.parametrize("name", COUNTS)
def test_each_key_of_a_published_file_is_reported_and_the_result_is_valid(name: str, tmp_path: Path) -> None:
    text = (PEERS / f"{name}.yaml").read_text()
    config, conversion = converted(text, tmp_path)
    counts = tuple(conversion.count(kind) for kind in ("mapped", "changed", "missing"))
    assert (conversion.tool, *counts) == COUNTS[name]
    keys = [line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()]
    reported = {line.key.partition(".")[0].partition("[")[0] for line in conversion.lines if line.key}
    assert reported == set(keys)
    assert all(line.note for line in conversion.lines if line.kind != "mapped")
    report = conversion.report(name)
    assert all(f"  {key}" in report for key in reported)
    for line in conversion.lines:  # what the report promises is what the run has
        for key, value in line.settings.items():
            block, _, leaf = key.rpartition(".")
            settings = getattr(config, block) if block else config
            kept = getattr(settings, leaf) if hasattr(settings, leaf) else config.training[leaf]
            assert kept == value, key


def test_the_galore_file_of_llama_factory_keeps_what_it_says() -> None:
    conversion = convert(str(PEERS / "llama_factory_galore.yaml"))
    assert 'galore_target: mlp,self_attn -> galore.target_modules: ["mlp", "self_attn"]' in conversion.report("x")
    assert line_of(conversion, "cutoff_len").settings == {"max_length": 1024}
    assert line_of(conversion, "template").kind == "missing"
    assert "accumulation and clipping" in line_of(conversion, "galore_layerwise").note


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ("galore_adamw", {"method": "galore", "galore.layerwise": False, "galore.state_bits": 32}),
        ("galore_adamw_8bit", {"method": "galore", "galore.state_bits": 8}),
        ("galore_adafactor", {"method": "galore"}),
        ("galore_adamw_layerwise", {"method": "galore_plus", "galore.layerwise": True, "galore.head_sharing": "joint"}),
        ("galore_adamw_8bit_layerwise", {"galore.layerwise": True, "galore.plain_state_bits": 8}),
        ("galore_adafactor_layerwise", {"galore.layerwise": True}),
        ("adamw_torch", {"method": "adamw"}),
        ("paged_adamw_8bit", {"method": "adamw_8bit"}),
        ("lion_32bit", {"method": "adamw"}),
    ],
)
@pytest.mark.parametrize("key", ["optim", "optimizer"])
def test_optimizers_of_transformers(key: str, optim: str, expected: dict[str, object], tmp_path: Path) -> None:
    base = "base_model: a/b\n" if key == "optimizer" else ""
    config, _ = converted(f"{base}{key}: {optim}\noptim_target_modules: all_linear\n", tmp_path)
    for name, value in expected.items():
        block, _, leaf = name.rpartition(".")
        assert getattr(getattr(config, block) if block else config, leaf) == value
    if optim.startswith("galore"):
        assert (config.galore.rank, config.galore.scale) == (128, 0.25)  # the defaults of transformers


@pytest.mark.parametrize("written", ['"rank=64, scale=0.5"', "{rank: 64, scale: 0.5}"])
def test_optim_args_are_read_as_text_and_as_a_mapping(written: str, tmp_path: Path) -> None:
    config, _ = converted(f"optim: galore_adamw\noptim_args: {written}\n", tmp_path)
    assert (config.galore.rank, config.galore.scale, config.galore.update_proj_gap) == (64, 0.5, 200)


def test_what_our_reader_refuses_is_left_out_and_reported(tmp_path: Path) -> None:
    text = "stage: sft\nfinetuning_type: full\nuse_galore: yes\ngalore_rank: 0\ngalore_proj_type: full\n"
    config, conversion = converted(text + "lr_scheduler_type: rex\n", tmp_path)
    assert config.method == "galore"
    for key, wanted in (("galore_rank", "at least 1"), ("galore_proj_type", "std"), ("lr_scheduler_type", "cosine")):
        assert line_of(conversion, key).kind == "missing"
        assert wanted in line_of(conversion, key).note


def test_a_file_without_model_and_data_gets_names_that_are_to_be_written(tmp_path: Path) -> None:
    config, conversion = converted("optim: galore_adamw\n", tmp_path)
    assert (config.model_name_or_path, config.data.source) == ("path/to/model", "path/to/train.jsonl")
    assert "data.source: path/to/train.jsonl  (The file names none" in conversion.report("x")


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    _, conversion = converted("optim: adamw_torch\nhub_token: hf_abc\n", tmp_path)
    assert "hf_abc" not in conversion.report("x") + conversion.text


@pytest.mark.parametrize("optimizer", ["galore_adamw", "adamw_bnb_8bit"])
def test_adapters_and_another_optimizer(optimizer: str, tmp_path: Path) -> None:
    config, conversion = converted(f"base_model: a/b\nadapter: qlora\nlora_r: 4\noptimizer: {optimizer}\n", tmp_path)
    assert (config.method, config.lora.rank) == ("lora", 4)
    assert line_of(conversion, "optimizer").kind == "changed"


def test_the_program_can_be_named(tmp_path: Path) -> None:
    text = "model_name_or_path: a/b\nlearning_rate: 1e-4\nwarmup_ratio: 0.1\n"
    assert converted(text, tmp_path)[1].tool == "transformers"
    assert converted(text, tmp_path, "llama-factory")[1].tool == "LLaMA-Factory"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("services: {web: 1}\n", ("none of the keys", "base_model", "optim_target_modules", "services")),
        ("output_dir: x\nper_device_train_batch_size: 1\nvolumes: 1\n", ("transformers", "it lacks", "optim_args")),
        ("seed: 1\n", ("galore-ft train", "as it is")),
    ],
)
def test_a_file_of_nobodys_is_refused_with_what_it_looks_like(
    text: str, named: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(OptionError) as caught:
        converted(text, tmp_path)
    assert all(name in str(caught.value) for name in named)


def test_yaml_goes_to_standard_output_alone_and_trains_in_a_dry_run(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "convert", str(PEERS / "transformers_galore.yaml")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("# From a file of transformers.\nmodel_name_or_path:")
    assert "10 mapped" in err
    ours = tmp_path / "ours.yaml"
    ours.write_text(out)
    rows = '{"prompt": "a %d", "completion": "b"}\n'
    (tmp_path / "rows.jsonl").write_text("".join(rows % i for i in range(8)))
    more = [f"model_name_or_path={tiny_model_dir}", f"data.source={tmp_path / 'rows.jsonl'}", "galore.rank=4"]
    words = ["data.eval_samples=2", "use_cpu=true", f"output_dir={tmp_path / 'run'}", "--dry-run"]
    assert main(["train", str(ours), *more, *words]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("value", [None, True, 1, -1, 0.5, 1e300, "x", "a, b", [], ["a", 1], {}, {"a": 1}])
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_any_value_of_any_key_is_reported(tool: Tool, value: object, tmp_path: Path) -> None:
    data = dict.fromkeys((key for key in tool.rules if "." not in key), value)
    config, conversion = converted(dump({**data, "optim": "galore_adamw", "seed": 3}), tmp_path, tool.name)
    assert config.training["seed"] == 3
    assert {line.key.partition("[")[0].partition(".")[0] for line in conversion.lines if line.key} >= data.keys()


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_tables_name_keys_of_ours_alone(tool) -> None:
    for name, rule in tool.rules.items():
        for one in (rule, *rule.cases.values()):
            assert {*one.sets, *([one.key] if one.key else [])} <= set(known_keys()), name
    for defaults in (tool.defaults, tool.galore_defaults, tool.lora_defaults):
        assert set(defaults) <= set(known_keys())


def test_every_setting_of_trl_has_a_rule() -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    from trl import ModelConfig, ScriptArguments

    fields = {field.name for cls in (ModelConfig, ScriptArguments) for field in dataclasses.fields(cls)}
    assert fields - set(TRL.rules) - set(known_keys()) == set()
