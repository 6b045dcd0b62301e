"""TRL's SFTTrainer on our examples: the Trainer's losses and arguments, packing, and what is refused by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

from galore_trainer.errors import OptionError
from galore_trainer.run.device import use_one_device
from galore_trainer.run.launching.plan import describe_plan
from galore_trainer.run.settings.arguments import training_arguments
from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training.train import train

trl = pytest.importorskip("trl")

Run = Callable[..., RunConfig]


def losses(config: RunConfig, key: str = "loss") -> list[float]:
    rows = map(json.loads, (Path(config.output_dir) / "log.jsonl").read_text().splitlines())
    return [row[key] for row in rows if key in row]


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / "model" / "model.safetensors")


@pytest.mark.parametrize("method", ["adamw", "galore_plus", "lora"])
def test_the_same_batches_give_the_same_losses_under_both(short_run: Run, method: str) -> None:
    settings = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no"}
    by = {name: short_run(name, method=method, trainer=name, **settings) for name in ("hf", "trl")}
    results = {name: train(config).result for name, config in by.items()}
    assert losses(by["trl"]) == pytest.approx(losses(by["hf"]), abs=1e-4)
    assert losses(by["trl"], "eval_loss") == pytest.approx(losses(by["hf"], "eval_loss"), abs=1e-4)
    assert [results[name]["trainer"] for name in by] == ["hf", "trl"]
    for key in ("steps", "parameters", "optimizer_state_bytes", "learning_rate"):
        assert results["trl"][key] == results["hf"][key]
    before, after = weights(by["hf"]), weights(by["trl"])
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-4, rtol=0)


def test_trl_s_own_defaults_do_not_sneak_in(short_run: Run) -> None:
    for settings in ({}, {"bf16": True, "gradient_checkpointing": True, "logging_steps": 3}):
        hf, sft = (training_arguments(short_run(trainer=name, **settings)) for name in ("hf", "trl"))
        assert type(sft) is trl.SFTConfig
        ours, theirs = hf.to_dict(), sft.to_dict()
        assert {key: theirs[key] for key in ours} == ours
        assert (sft.bf16, sft.gradient_checkpointing) == (bool(settings), bool(settings))
        assert sft.max_length == 400


def test_packed_examples_do_not_see_each_other(short_run: Run) -> None:
    """Four examples in one row: the loss of the first step is that of four rows, and later steps go on from there."""
    settings = {
        "per_device_train_batch_size": 4,
        "max_length": 1000,
        "save_strategy": "no",
        "method": "adamw",
        "data": {"source": "embedded:arithmetic", "train_samples": 4, "eval_samples": 4},
    }
    plain = short_run("plain", **settings)
    train(plain)
    for name, more in {"packed": {"packing": True}, "flat": {"padding_free": True}}.items():
        config = short_run(name, trainer="trl", **settings, **more)
        result = train(config).result
        assert losses(config) == pytest.approx(losses(plain), abs=1e-4)
        assert result["score_after"]["eval_loss"] > 0


def test_packing_makes_fewer_longer_rows_and_is_written_down(short_run: Run) -> None:
    settings = {"trainer": "trl", "max_steps": -1, "num_train_epochs": 1, "save_strategy": "no"}
    packed, plain = short_run("packed", packing=True, **settings), short_run("plain", **settings)
    fewer, more = (train(config).result["steps"] for config in (packed, plain))
    assert fewer < more == 20
    saved = (Path(packed.output_dir) / "config.resolved.yaml").read_text()
    assert "packing: true" in saved
    assert "trainer: trl" in saved
    plan = describe_plan(packed)
    assert "by TRL's SFTTrainer" in plan
    assert "fewer once they are packed" in plan


def test_a_run_by_trl_resumes_leaves_one_card_and_reports_to_nobody(
    short_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *a, **k: pytest.fail("reported"))
    config = short_run(trainer="trl", packing=True, save_total_limit=3)
    train(config)
    folder, whole = Path(config.output_dir), weights(config)
    assert [p.relative_to(folder).as_posix() for p in folder.rglob("README.md")] == ["model/README.md"]
    (folder / "checkpoint-6" / "manifest.json").unlink()
    assert train(config, resume="auto").result["resumed_from_step"] == 4
    assert all(torch.equal(whole[name], again) for name, again in weights(config).items())


@pytest.mark.parametrize(
    ("settings", "option", "words"),
    [
        ({"packing": True}, "packing", "add 'trainer: trl'"),
        ({"trainer": "trl", "packing": True, "packing_strategy": "wrapped"}, "packing_strategy", "bfd, bfd_split"),
        ({"trainer": "trl", "shuffle_dataset": True}, "shuffle_dataset", "train_sampling_strategy"),
        ({"trainer": "trl", "completion_only_loss": False}, "completion_only_loss", "on the answer alone"),
        ({"trainer": "trl", "activation_offloading": True}, "activation_offloading", "a GPU"),
        pytest.param(
            {"trainer": "trl", "router_aux_loss_coef": 0.1},
            "trainer",
            "Mixture-of-Experts",
            marks=pytest.mark.skipif(Version(trl.__version__) < Version("1.14"), reason="older ones say nothing"),
        ),
    ],
)
def test_what_fights_with_our_examples_or_the_machine_is_refused(
    short_run: Run, settings: dict, option: str, words: str
) -> None:
    with pytest.raises(OptionError, match=words) as error:
        train(short_run(**settings))
    assert error.value.option == option
    assert not list(Path(short_run().output_dir).glob("*"))


def test_without_trl_the_way_to_get_it_is_named(short_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(OptionError, match=r"pip install 'galore-trainer\[trl\]'") as error:
        train(short_run(trainer="trl"))
    assert error.value.option == "trainer"


def test_several_gpus_without_a_launcher_are_not_shared_in_silence(short_run: Run) -> None:
    arguments = training_arguments(short_run())
    assert use_one_device(arguments) is None
    arguments._n_gpu = 4
    assert "4 GPUs are visible, this run uses one" in str(use_one_device(arguments))
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, arguments.per_device_train_batch_size)


def test_layerwise_mode_equals_the_ordinary_run_under_both_trainers(short_run: Run) -> None:
    """Accumulation without clipping, whose norm is estimated: the same losses as with whole gradients."""
    method = {"rank": 4, "update_proj_gap": 2, "residual": "sparse"}
    more = {"gradient_accumulation_steps": 2, "save_strategy": "no", "max_grad_norm": 0.0}
    ordinary = short_run("whole", **more, galore={**method, "stagger_refresh": True, "first_basis": "sketch"})
    train(ordinary)
    for trainer in ("hf", "trl"):
        layerwise = short_run(trainer, **more, trainer=trainer, galore={**method, "layerwise": True})
        train(layerwise)
        assert losses(layerwise) == pytest.approx(losses(ordinary), abs=1e-4)
        assert min(losses(layerwise, "grad_norm")) > 0.0
