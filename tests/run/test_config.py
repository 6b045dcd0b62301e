"""A configuration is what was written, in the order of its sources; what it cannot honour is refused by name."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from pathlib import Path

import pytest

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.run.settings.keys import GONE, NOT_OURS, ONLY_TRL, OUR_NAMES, training_hints
from galore_trainer.run.settings.knobs import knob_table
from galore_trainer.run.settings.methods import METHODS, LoraSettings
from galore_trainer.run.settings.run_config import EvalConfig, RunConfig, known_keys, load_run_config

YAML = """\
learning_rate: "2e-4"
max_steps: 1e2
bf16: auto
galore:
  rank: 16
eval: {limit: 20}
methods:
  adamw: {learning_rate: 3e-4}
  galore_plus: {galore: {scale: 5}, galore.update_proj_gap: 40}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(YAML)
    return path


def refusal(*args, **kwargs) -> OptionError:
    with pytest.raises(OptionError) as caught:
        load_run_config(*args, **kwargs)
    return caught.value


def test_each_source_lies_above_the_one_before(file: Path) -> None:
    config = load_run_config(file, ["galore.scale=7"], {"eval.limit": "30"})
    assert config.galore.proj_type == GaLoreConfig().proj_type  # declared default
    assert config.galore.rank == 16  # file
    assert config.galore.update_proj_gap == 40  # the method's block in the file
    assert config.galore.scale == 7  # override above that block
    assert config.eval.limit == 30  # flag above the file
    assert config.output_dir == "runs/mine-galore_plus"
    assert load_run_config(file, [], {"method": "adamw"}).training["learning_rate"] == 3e-4
    assert load_run_config(file, ["methods.adamw.learning_rate=1e-3"], {"method": "adamw"}).training == {
        "learning_rate": 1e-3,
        "max_steps": 100,
        "bf16": "auto",
    }


def test_values_take_the_type_of_their_field(file: Path) -> None:
    overrides = [
        "run_name=001",
        "galore.target_modules=[qk]_proj$",
        "report_to=[wandb, tensorboard]",
        "warmup_steps=.03",
        "galore.oversampling=none",
        "galore.rank_pattern={o_proj: 8}",
        "lr_scheduler_kwargs={num_cycles: 2}",
        "eval.extract=strict",
        "gradient_checkpointing=true",
        "data.revision=1e5",
        "hub_revision=a #b",
    ]
    config = load_run_config(file, overrides)
    assert config.training == {
        "learning_rate": 2e-4,
        "max_steps": 100,
        "bf16": "auto",
        "run_name": "001",
        "report_to": ["wandb", "tensorboard"],
        "warmup_steps": 0.03,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "gradient_checkpointing": True,
        "hub_revision": "a #b",
    }
    assert type(config.training["max_steps"]) is int
    assert config.galore.target_modules == "[qk]_proj$"
    assert config.galore.rank_pattern == {"o_proj": 8}
    assert config.galore.oversampling is None
    assert config.data.revision == "1e5"


@pytest.mark.parametrize("method", METHODS)
def test_the_resolved_file_loads_back_to_an_equal_configuration(file: Path, tmp_path: Path, method: str) -> None:
    text = ["run_name=1e-4", "hub_revision=yes", "project=null and void", "trackio_space_id='none'"]
    config = load_run_config(file, text, {"method": method, "learning_rate": "3e-5"})
    saved = tmp_path / "resolved.yaml"
    saved.write_text(config.to_yaml())
    assert load_run_config(saved) == config
    assert RunConfig.from_dict(config.to_dict()) == config
    assert config.training["learning_rate"] == 3e-5
    assert method not in config.methods


def test_galore_means_its_own_basis_and_refuses_another(file: Path) -> None:
    config = load_run_config(file, [], {"method": "galore"})
    assert (config.galore.head_sharing, config.galore.svd, config.galore.momentum_transfer) == (
        "joint",
        "exact",
        "keep",
    )
    error = refusal(file, [], {"method": "galore", "galore.head_sharing": "shared"})
    assert error.option == "galore.head_sharing"
    assert "galore_plus" in error.way_out
    with pytest.raises(OptionError, match="galore_plus"):
        RunConfig(method="galore", galore=GaLoreConfig())


@pytest.mark.parametrize("method", [name for name, spec in METHODS.items() if spec.block != "galore"])
def test_others_refuse_galore_settings_of_the_command_line_alone(file: Path, method: str) -> None:
    assert load_run_config(file, [f"method={method}"]).galore.rank == 16
    for overrides, flags in ((["galore.rank=8"], {}), ([], {"galore.rank": "8"}), (["galore={rank: 8}"], {})):
        error = refusal(file, [*overrides, f"method={method}"], flags)
        assert error.option == "galore.rank"
        assert "rank" in error.got
        assert "--method galore_plus" in error.way_out


def test_settings_of_lora_are_for_lora_and_dora_alone(file: Path) -> None:
    for method in ("lora", "dora"):
        assert load_run_config(file, ["lora.alpha=8", f"method={method}"], {"lora.rank": "4"}).lora.rank == 4
    for method in ("galore_plus", "adamw"):
        error = refusal(file, [], {"method": method, "lora.rank": "4"})
        assert (error.option, error.got) == ("lora.rank", "--lora-rank 4")
        assert "--method lora or dora" in error.way_out
    for setting, wanted in (("rank=0", "at least 1"), ("dropout=1", "below 1"), ("target_modules=[]", "one name")):
        assert wanted in refusal(file, ["method=lora", f"lora.{setting}"]).wanted


@pytest.mark.parametrize(
    ("overrides", "flags", "named"),
    [
        (["galore.rank=8"], {"galore.rank": "16"}, ("galore.rank=8", "--rank 16")),
        (["galore={rank: 8}"], {"galore.rank": "16"}, ("galore={rank: 8}", "--rank 16")),
        (["seed=1", "seed=1"], {}, ("seed=1 and seed=1",)),
        (["galore.stochastic_rounding=true"], {"galore.stochastic_rounding": False}, ("--no-stochastic-rounding",)),
        (["model_name_or_path=a"], {"model_name_or_path": "b"}, ("--model b",)),
    ],
)
def test_a_setting_given_twice_is_refused_naming_both(file: Path, overrides, flags, named) -> None:
    message = str(refusal(file, overrides, flags))
    assert all(name in message for name in named)


@pytest.mark.parametrize(
    ("override", "option", "way_out"),
    [
        ("lerning_rate=1", "lerning_rate", "'learning_rate'"),
        ("galore.rnak=1", "galore.rnak", "'galore.rank'"),
        ("rank=1", "rank", "'galore.rank'"),
        ("galore.learning_rate=1", "galore.learning_rate", "'learning_rate'"),
        ("galore.zzz=1", "galore.zzz", "update_proj_gap"),
        ("zzz=1", "zzz", "model_name_or_path"),
        ("methods.adamw.rnak=1", "methods.adamw.rnak", "'galore.rank'"),
        ("methods.galor.learning_rate=1", "methods.galor", "'galore'"),
        ("lr_scheduler_kwargs.num_cycles=2", "lr_scheduler_kwargs.num_cycles", "lr_scheduler_kwargs={num_cycles: 2}"),
        ("warmup_ratio=0.03", "warmup_ratio", "'warmup_steps: 0.03'"),
        ("galore_update_interval=50", "galore_update_interval", "'galore.update_proj_gap=50'"),
        ("cutoff_len=512", "cutoff_len", "'max_length: 512'"),
        ("no_cuda=true", "no_cuda", "'use_cpu: true'"),
        ("optim=galore_adamw", "optim", "method: galore"),
        ("padding_free=true", "padding_free", "--trainer trl"),
        ("assistant_only_loss=true", "assistant_only_loss", "SFTTrainer"),
        ("lora_r=8", "lora_r", "'lora.rank=8'"),
        ("lora.r=8", "lora.r", "'lora.rank=8'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_way_out(file: Path, override: str, option: str, way_out: str) -> None:
    error = refusal(file, [override])
    assert error.option == option
    assert way_out in error.way_out


@pytest.mark.parametrize("key", [*OUR_NAMES, *GONE, *NOT_OURS, *ONLY_TRL])
def test_every_refused_name_has_a_way_out_and_is_no_key(key: str) -> None:
    error = refusal(None, [f"{key}=1"])
    assert error.option == key
    assert error.way_out
    assert key not in known_keys()


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("learning_rate=fast", "a number"),
        ("max_steps=1.5", "an integer"),
        ("method=galor", "one of galore_plus, galore, adamw"),
        ("trainer=sft", "one of hf, trl"),
        ("packing_strategy=wrapped", "one of bfd, bfd_split"),
        ("lr_scheduler_type=cosin", "cosine_with_restarts"),
        ("galore=8", "a mapping"),
        ("galore.rank=0", "at least 1"),
        ("galore.scale=.nan", "finite"),
        ("galore.svd=Exact", "one of randomized, exact"),
        ("eval.limit=0", "at least 1"),
        ("eval.before=1", "true or false"),
        ("seed", "key=value"),
        ("=3", "key=value"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_what_is_wanted(file: Path, override: str, wanted: str) -> None:
    assert wanted in refusal(file, [override]).wanted


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("seed: 1\ngalore:\n  rank: 8\n  rank: 9\n", ("line 4", "line 3", "'rank'")),
        ("galore: {rank: 8}\ngalore.rank: 9\n", ("line 1", "line 2", "galore.rank")),
        ("seed: 1\n  a: b: c\n", ("line 2",)),
        ("seed: 1\nlerning_rate: 1\n", ("line 2", "learning_rate")),
        ("seed: 1\n\ngalore:\n  rank: many\n", ("line 4", "galore.rank", "an integer")),
        ("- seed\n", ("a mapping",)),
        ("", ("nothing",)),
        ("1: 2\n", ("Quote it",)),
        ("run_name: 12\n", ("run_name", "quotes")),
        ("a: !!python/object/apply:os.getcwd []\n", ("line 1",)),
        ("a: \x01\n", ("mine.yaml",)),
    ],
)
def test_a_bad_file_is_refused_naming_file_and_line(file: Path, text: str, named: tuple[str, ...]) -> None:
    file.write_text(text)
    message = str(refusal(file))
    assert "mine.yaml" in message
    assert all(name in message for name in named)


def test_files_that_cannot_be_read_and_names_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in str(refusal(binary))
    assert refusal("quikstart").way_out == "Did you mean 'quickstart'?"
    assert "a packaged name or the path" in str(refusal(tmp_path))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("010", 10), ("0x1F", 31), ("0o17", 15), ("-1", -1), (".5", 0.5), ("~", None), ("true", True)]
    + [(text, text) for text in ("on", "off", "yes", "no", "1_000", "2026-01-01", "1:30", "1e", "none")],
)
def test_scalars_are_those_of_yaml_1_2_in_files_and_on_the_command_line(text: str, value: object) -> None:
    from galore_trainer.run.settings.yaml_io import dump, parse_value, read_mapping

    assert read_mapping(f"a: {text}", "x").data == {"a": value}
    assert parse_value(text) == value
    assert read_mapping(dump({"a": text, "b": value}), "x").data == {"a": text, "b": value}


def test_a_run_refuses_training_arguments_that_transformers_does_not_know() -> None:
    with pytest.raises(OptionError, match="learning_rate"):
        RunConfig(training={"lerning_rate": 1e-4})
    assert RunConfig(training={"learning_rate": "1e-4"}).training == {"learning_rate": 1e-4}


def test_training_arguments_decide_auto_and_pass_the_trainers_own_refusals_on(tmp_path: Path) -> None:
    from galore_trainer.run.settings.arguments import training_arguments

    config = RunConfig(output_dir=str(tmp_path), training={"bf16": "auto", "use_cpu": True, "warmup_steps": 3})
    arguments = training_arguments(config, logging_steps=7, warmup_steps=9)
    assert arguments.bf16 in (True, False)
    assert (arguments.warmup_steps, arguments.logging_steps) == (3, 7)
    bad = dataclasses.replace(config, training={"load_best_model_at_end": True, "save_strategy": "steps"})
    with pytest.raises(OptionError, match="load_best_model_at_end"):
        training_arguments(bad)


def test_every_training_argument_is_a_key_or_is_refused_by_name() -> None:
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    refused = {*OUR_NAMES, *GONE, *NOT_OURS, *ONLY_TRL}
    assert fields - refused - {"output_dir"} == set(training_hints())
    assert fields <= set(known_keys()) | refused


def test_every_setting_of_trl_alone_is_refused_by_name() -> None:
    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("trl is not installed")
    tree = ast.parse((Path(spec.origin).parent / "trainer" / "sft_config.py").read_text())
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "SFTConfig")
    fields = {node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)}
    assert "packing" in fields
    assert fields - set(known_keys()) <= set(ONLY_TRL)


def test_the_table_of_knobs_has_a_row_for_every_field() -> None:
    for cls, prefix in ((GaLoreConfig, "galore."), (LoraSettings, "lora."), (EvalConfig, "eval.")):
        table = knob_table(cls)
        assert all(f"| `{prefix}{field.name}` |" in table for field in dataclasses.fields(cls))
        assert {line.count(" | ") for line in table.splitlines()} == {3}
    assert "| `galore.rank` | `32` | an integer, at least 1 |" in knob_table(GaLoreConfig)
    assert "| `method` |" in knob_table(RunConfig)
