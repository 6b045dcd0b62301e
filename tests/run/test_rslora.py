"""Rank-stabilised adapters, and the alpha that follows the rank."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from galore_trainer.errors import OptionError
from galore_trainer.run.launching.plan import describe_plan
from galore_trainer.run.models.adapters import add_adapters
from galore_trainer.run.settings.methods import LoraSettings
from galore_trainer.run.settings.run_config import RunConfig, load_run_config
from galore_trainer.run.training.train import train

Run = Callable[..., RunConfig]


@pytest.mark.parametrize(("rank", "rslora", "alpha"), [(32, False, 64), (8, False, 16), (8, True, 16), (256, True, 16)])
def test_an_alpha_that_is_not_set_follows_the_rank(rank: int, rslora: bool, alpha: int, tmp_path: Path) -> None:
    settings = [f"lora.rank={rank}", f"lora.use_rslora={str(rslora).lower()}", "method=lora"]
    config = load_run_config("quickstart", settings)
    assert config.lora.alpha == alpha
    saved = tmp_path / "saved.yaml"
    saved.write_text(config.to_yaml())
    assert load_run_config(saved) == config
    assert load_run_config("quickstart", [*settings, "lora.alpha=5"]).lora.alpha == 5
    with pytest.raises(OptionError, match=r"lora\.alpha"):
        load_run_config("quickstart", [*settings, "lora.alpha=0"])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_scales_by_what_the_settings_say(rslora: bool, dora: bool, tiny_model_dir: Path) -> None:
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    add_adapters(model, LoraSettings(rank=4, alpha=6, use_rslora=rslora), seed=0, dora=dora)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(6 / (math.sqrt(4) if rslora else 4))


def test_a_run_with_it_is_saved_merged_and_not_resumed_without_it(short_run: Run) -> None:
    pytest.importorskip("peft")
    config = short_run(method="lora", lora={"rank": 4, "use_rslora": True})
    assert "alpha 16 over sqrt(rank)" in describe_plan(config)
    train(config)
    folder = Path(config.output_dir)
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (adapter["use_rslora"], adapter["lora_alpha"]) == (True, 16)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    before, after = (
        load_file(path / "model.safetensors")[f"{name}.weight"]
        for path in (Path(config.model_name_or_path), folder / "model")
    )
    torch.testing.assert_close(after - before, 16 / math.sqrt(4) * (b @ a), atol=1e-6, rtol=1e-4)
    with pytest.raises(OptionError, match=r"lora\.use_rslora.*Resume with lora\.use_rslora=True"):
        train(short_run(method="lora", lora={"rank": 4, "alpha": 16}), resume="auto")
