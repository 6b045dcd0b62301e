"""All unknown keys stand in one refusal, and what it advises is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from galore_trainer.cli.main import main
from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.run.settings.keys import REFUSED
from galore_trainer.run.settings.methods import LoraSettings
from galore_trainer.run.settings.run_config import RunConfig, known_keys, load_run_config

FILE = """\
lerning_rate: 1
galore: {rnak: 8, scale: many}
methods:
  adamw: {max_stpes: 2}
  galor: {seed: 1}
cutoff_len: 1024
zzz: 0
"""


def refusal(*args, **kwargs) -> OptionError:
    with pytest.raises(OptionError) as caught:
        load_run_config(*args, **kwargs)
    return caught.value


def test_every_unknown_key_of_file_and_command_line_is_listed_with_its_nearest(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(FILE)
    error = refusal(file, ["eval.limt=3", "lora_rank=8"])
    wanted = {
        "lerning_rate": "'learning_rate'? (" + f"{file}, line 1)",
        "galore.rnak": f"'galore.rank'? ({file}, line 2)",
        "methods.adamw.max_stpes": f"'max_steps'? ({file}, line 4)",
        "methods.galor": "'galore'",
        "cutoff_len": f"'max_length: 1024'. ({file}, line 6)",
        "zzz": f"No known key is near it. ({file}, line 7)",
        "eval.limt": "'eval.limit'",
        "lora_rank": "'lora.rank=8'",
    }
    assert set(error.got) == set(wanted)
    lines = {line.strip().partition(":")[0]: line for line in error.way_out.splitlines()}
    for key, way_out in wanted.items():
        assert way_out in lines[key]


def test_training_arguments_from_python_are_refused_together() -> None:
    with pytest.raises(OptionError) as caught:
        RunConfig(training={"lerning_rate": 1, "max_stpes": 2})
    assert caught.value.got == ["lerning_rate", "max_stpes"]


def test_one_unknown_key_is_refused_as_before() -> None:
    error = refusal(None, ["lerning_rate=1"])
    assert (error.option, error.got, error.way_out) == ("lerning_rate", 1, "Did you mean 'learning_rate'?")


def test_a_file_of_another_program_is_recognised_even_without_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in (["train"], ["data", "preview"], ["estimate"], ["eval", str(tmp_path)], ["config", "validate"]):
        file = Path(__file__).parents[1] / "fixtures" / "peers" / "llama_factory_galore.yaml"
        assert main([*command, str(file)]) == 2
        message = capsys.readouterr().err
        assert "looks like a file of LLaMA-Factory" in message
        assert all(key in message for key in ("stage", "galore_rank", "template", "val_size", "plot_loss"))


@pytest.mark.parametrize("value", ["all", "all_linear", "mlp,self_attn", "q_proj, v_proj", "[attn, mlp]", "all-linear"])
@pytest.mark.parametrize("key", ["galore_target", "optim_target_modules", "lora_target_modules"])
def test_advice_on_modules_is_accepted(key: str, value: str) -> None:
    way_out = refusal(None, [f"{key}={value}"]).way_out
    advised = re.search("'(.*)'", way_out)[1]
    method = "lora" if advised.startswith("lora.") else "galore_plus"
    config = load_run_config(None, [advised, f"method={method}"])
    settings: GaLoreConfig | LoraSettings = config.lora if method == "lora" else config.galore
    assert settings.target_modules in ("all-linear", ["mlp", "self_attn"], ["q_proj", "v_proj"], ["attn", "mlp"])


@pytest.mark.parametrize("value", ["0", "-1", "full", "1e-4", "true", "[a, b]", "none", "''", "x y", "{a: 1}", "all"])
def test_no_advice_is_refused(value: str) -> None:
    """Whatever a user wrote, 'Write KEY=VALUE' is what the reader takes."""
    for key in (key for table, _ in REFUSED for key in table):
        error = refusal(None, [f"{key}={value}"])
        template = next(table[key] for table, _ in REFUSED if key in table)
        target = re.search(r"'([\w.]+)(=|: )\{value\}'", template)
        if target is None or "..." in error.way_out:
            continue
        written = re.search(rf"'{re.escape(target[1] + target[2])}(.*?)'[.;,]", error.way_out)
        assert target[1] in known_keys()
        more = ["method=lora"] if target[1].startswith("lora.") else []
        load_run_config(None, [f"{target[1]}={written[1]}", *more])
