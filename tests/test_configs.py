"""Every packaged configuration is valid under every method, loads back from what it resolves to, and can be planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from galore_trainer.run.settings.arguments import training_arguments
from galore_trainer.run.settings.methods import METHODS
from galore_trainer.run.settings.run_config import load_run_config, packaged_configs

NAMES = sorted(packaged_configs())


def test_the_recipes_are_packaged() -> None:
    assert {"quickstart", "arithmetic", "gsm8k", "mawps", "nlg", "restaurants", "sft"} <= set(NAMES)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_it_validates_and_round_trips(name: str, method: str, tmp_path: Path) -> None:
    config = load_run_config(name, [], {"method": method})
    assert config.method == method
    assert config.output_dir == f"runs/{name}-{method}"
    assert config.training["learning_rate"] > 0
    assert method not in config.methods
    assert set(config.methods) == set(METHODS) - {method}
    saved = tmp_path / "saved.yaml"
    saved.write_text(config.to_yaml())
    assert load_run_config(saved) == config


@pytest.mark.parametrize("name", NAMES)
def test_transformers_accepts_it(name: str, tmp_path: Path) -> None:
    config = load_run_config(name, ["use_cpu=true"], {"output_dir": str(tmp_path)})
    assert training_arguments(config).learning_rate == config.training["learning_rate"]


@pytest.mark.parametrize("name", NAMES)
def test_its_first_line_says_what_it_is(name: str) -> None:
    first = packaged_configs()[name].splitlines()[0]
    assert first.startswith("# ")
    assert len(first) <= 110


def test_the_quickstart_plan_counts_data_and_steps() -> None:
    from galore_trainer.run.launching.plan import describe_plan

    settings = ["data.train_samples=100", "max_steps=-1", "num_train_epochs=2", "per_device_train_batch_size=16"]
    config = load_run_config("quickstart", settings)
    plan = describe_plan(config)
    assert "100 to train on, 100 held out" in plan
    assert "14 steps of 16 examples each (2 epochs of 7 steps)" in plan
    assert "projected weights 0.0002 x sqrt(n / rank) of each, others 0.0002 x 0.25 = 5e-05" in plan
