"""``attn_implementation``, ``trust_remote_code`` and ``torch_dtype``: what reaches the model, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from galore_trainer.cli.main import main
from galore_trainer.errors import OptionError
from galore_trainer.run.memory.estimate import empty_model, estimate_one
from galore_trainer.run.models.model import load_model
from galore_trainer.run.settings.arguments import check_method, training_arguments
from galore_trainer.run.settings.run_config import RunConfig, load_run_config
from galore_trainer.run.settings.schema import json_schema

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own_model(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose model and tokenizer are classes of its own Python file."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "own.py").write_text(CODE)
    change(
        folder / "config.json",
        model_type="own",
        auto_map=of_own(AutoConfig="Config", AutoModelForCausalLM="ForCausalLM"),
    )
    tokenizer = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=tokenizer)
    return folder


def of_own(**classes: str) -> dict[str, str]:
    return {auto: f"own.Own{name}" for auto, name in classes.items()}


def change(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


# ------------------------------------------------------------------------------------------ trust_remote_code


@pytest.mark.parametrize(
    "words",
    [
        ["train", "FILE", "--dry-run"],
        ["train", "FILE"],
        ["data", "preview", "FILE"],
        ["estimate", "FILE"],
        ["inspect", "MODEL"],
        ["eval", "MODEL", "FILE"],
        ["chat", "MODEL"],
    ],
    ids=lambda words: words[0],
)
def test_code_of_a_model_is_run_only_if_asked_for_by_name(
    words: list[str], own_model: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load(tiny_base.read_text()) | {"model_name_or_path": str(own_model)}
    settings["output_dir"] = str(tiny_base.parent / "run")
    tiny_base.write_text(yaml.safe_dump(settings))
    command = [{"FILE": str(tiny_base), "MODEL": str(own_model)}.get(word, word) for word in words]
    marker = own_model / "ran"
    (own_model / "own.py").write_text(f"{CODE}\nopen({str(marker)!r}, 'w').close()\n")
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "trust_remote_code: got False" in said
    assert "Python code" in said
    assert "add trust_remote_code=true" in said
    assert not marker.exists()


def test_a_trusted_model_trains_is_scored_and_loads_again_with_its_code(
    own_model: Path, tiny_base: Path, capsys
) -> None:
    run = tiny_base.parent / "run"
    words = ["train", str(tiny_base), "--model", str(own_model), "--output-dir", str(run), "trust_remote_code=true"]
    assert main([*words, "--dry-run"]) == 0
    assert main(words) == 0
    assert (run / "model" / "own.py").is_file()
    capsys.readouterr()
    assert main(["eval", str(run), "--limit", "1", "--json"]) == 0  # by the setting of the run
    assert json.loads(capsys.readouterr().out)["n"] == 1
    model, tokenizer = load_model(str(run), trust_remote_code=True)
    assert (type(model).__name__, type(tokenizer).__name__) == ("OwnForCausalLM", "OwnTokenizer")


# ------------------------------------------------------------------------------------------ attn_implementation


def test_the_attention_reaches_the_model_and_its_estimate(tiny_model_dir: Path) -> None:
    for attention in ("eager", "sdpa"):
        model, _ = load_model(str(tiny_model_dir), attn_implementation=attention)
        assert model.config._attn_implementation == attention
        config = RunConfig(model_name_or_path=str(tiny_model_dir), attn_implementation=attention)
        assert empty_model(config).config._attn_implementation == attention
    config = RunConfig(model_name_or_path=str(tiny_model_dir), max_length=400, training={"use_cpu": True})
    eager = RunConfig(**{**vars(config), "attn_implementation": "eager"})
    assert estimate_one(eager, "adamw").peak > estimate_one(config, "adamw").peak  # it keeps every score


@pytest.mark.parametrize(
    ("attention", "words"),
    [("flash_attention_2", "flash-attn installed"), ("flash_attention_3", "flash-attn-3"), ("flex_attention", "a GPU")],
)
def test_an_attention_that_this_machine_cannot_compute_is_refused_before_the_run(
    attention: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = __import__("importlib.util").util.find_spec
    absent = ("flash_attn", "flash_attn_interface", "kernels")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else find_spec(name))
    config = RunConfig(attn_implementation=attention, training={"use_cpu": True})
    with pytest.raises(OptionError, match=words) as caught:
        check_method(config, training_arguments(config))
    assert caught.value.option == "attn_implementation"
    assert "sdpa" in caught.value.way_out


def test_an_unknown_attention_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"eager.*sdpa.*flash_attention_2"):
        load_run_config(None, ["attn_implementation=fast"])


def test_a_model_without_that_attention_is_refused_by_the_setting(tiny_model_dir: Path, monkeypatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    with pytest.raises(OptionError, match="eager") as caught:
        load_model(str(tiny_model_dir), attn_implementation="sdpa")
    assert caught.value.option == "attn_implementation"


# ------------------------------------------------------------------------------------------ torch_dtype


def test_torch_dtype_is_another_name_of_dtype(tmp_path: Path) -> None:
    assert load_run_config(None, ["torch_dtype=bfloat16"]).dtype == "bfloat16"
    assert load_run_config(None, ["torch_dtype=auto", "dtype=auto"]).to_dict()["dtype"] == "auto"
    file = tmp_path / "a.yaml"
    file.write_text("torch_dtype: bfloat16\nmethods: {adamw: {torch_dtype: float32}}\n")
    assert load_run_config(file).dtype == "bfloat16"
    assert load_run_config(file, ["method=adamw"]).dtype == "float32"
    assert load_run_config(file, ["dtype=float32"]).dtype == "float32"  # a command line stands above a file
    assert json_schema()["properties"]["torch_dtype"]["enum"] == ["float32", "bfloat16", "auto"]
    assert "torch_dtype" not in load_run_config(file).to_dict()


@pytest.mark.parametrize("words", [["torch_dtype=auto", "dtype=bfloat16"], ["dtype=float32", "torch_dtype=bfloat16"]])
def test_two_names_with_two_values_are_refused(words: list[str]) -> None:
    with pytest.raises(OptionError, match="dtype and torch_dtype"):
        load_run_config(None, words)


def test_torch_dtype_takes_what_dtype_takes() -> None:
    with pytest.raises(OptionError, match="bfloat16") as caught:
        load_run_config(None, ["torch_dtype=float16"])
    assert caught.value.option == "torch_dtype"


def test_weights_have_the_type_that_either_name_says(tiny_model_dir: Path) -> None:
    config = load_run_config(None, [f"model_name_or_path={tiny_model_dir}", "torch_dtype=bfloat16"])
    model, _ = load_model(config.model_name_or_path, **config.loading)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
