"""Every method trains, saves a model that loads by itself, tells what it cost, and refuses what it cannot honour."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from galore_trainer.errors import OptionError
from galore_trainer.run.launching.plan import describe_plan
from galore_trainer.run.results.card import model_card
from galore_trainer.run.settings.arguments import check_method, training_arguments
from galore_trainer.run.settings.methods import METHODS, Method, resolve
from galore_trainer.run.settings.run_config import RunConfig, known_keys
from galore_trainer.run.training.train import train
from times import times

Run = Callable[..., RunConfig]
IDS = torch.arange(3, 40)[None]


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / "model" / "model.safetensors")


def load(folder: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_the_registry_has_every_method_and_sets_known_keys_alone() -> None:
    assert tuple(METHODS) == get_args(Method)
    assert {key for spec in METHODS.values() for key in spec.defaults} <= set(known_keys())


@pytest.mark.parametrize("method", METHODS)
def test_the_functions_that_a_method_names_are_there_and_take_what_they_are_given(method: str) -> None:
    spec = METHODS[method]
    assert list(inspect.signature(resolve(spec.prepare)).parameters) == ["model", "config", "arguments"]
    if spec.finish is not None:
        assert list(inspect.signature(resolve(spec.finish)).parameters) == ["trainer", "config", "output"]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_are_merged_into_a_model_that_says_what_they_said(short_run: Run, method: str) -> None:
    peft = pytest.importorskip("peft")
    config = short_run(method=method, learning_rate=1e-2, eval={"max_new_tokens": 4, "before": True})
    result = train(config).result
    assert result["score_after"]["eval_loss"] < result["score_before"]["eval_loss"]
    folder = Path(config.output_dir)
    merged, base = load(folder / "model"), load(config.model_name_or_path)
    adapted = peft.PeftModel.from_pretrained(load(config.model_name_or_path), folder / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, atol=1e-5, rtol=1e-5)
        assert (merged(IDS).logits - base(IDS).logits).abs().max() > 0.01

    adapters = [p.numel() for name, p in adapted.named_parameters() if "lora_" in name]
    assert result["parameters"] == {"trained": sum(adapters), "total": sum(adapters) + base.num_parameters()}
    counters = 4 * len(adapters)
    assert result["optimizer_state_bytes"] == {"plain": 2 * 4 * sum(adapters) + counters}
    assert result["learning_rate"] == 1e-2
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["use_dora"] == (method == "dora")
    texts = [p.read_text() for p in (folder / "adapter" / "adapter_config.json", folder / "model" / "README.md")]
    assert not any(str(Path(config.model_name_or_path).parent) in text for text in texts)
    assert "galore.rank" not in texts[1]
    assert "| `lora.rank` | `4` |" in texts[1]


def test_adapters_are_float32_on_bfloat16_weights_and_take_peft_s_targets(short_run: Run) -> None:
    pytest.importorskip("peft")
    config = short_run(method="lora", dtype="bfloat16", lora={"rank": 4, "target_modules": ["q_proj"], "dropout": 0.1})
    result = train(config).result
    assert result["optimizer_state_bytes"] == {"plain": 2 * 4 * (2 * 4 * (64 + 64)) + 4 * 4}
    before, after = load_file(Path(config.model_name_or_path) / "model.safetensors"), weights(config)
    changed = {name for name in after if not torch.equal(before[name].bfloat16(), after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    assert {w.dtype for w in after.values()} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_resume_bit_for_bit(short_run: Run, method: str) -> None:
    pytest.importorskip("peft")
    config = short_run(method=method, save_total_limit=3, lora={"rank": 4, "dropout": 0.1})
    train(config)
    whole = weights(config)
    (Path(config.output_dir) / "checkpoint-6" / "manifest.json").unlink()
    assert train(config, resume="auto").result["resumed_from_step"] == 4
    assert all(torch.equal(whole[name], again) for name, again in weights(config).items())
    with pytest.raises(OptionError, match=r"lora\.rank.*Resume with lora\.rank=4"):
        train(dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=8)), resume="auto")


def test_the_package_galore_torch_takes_the_steps_of_our_galore(short_run: Run) -> None:
    pytest.importorskip("galore_torch")
    settings = {
        "adam_epsilon": 1e-12,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "galore": {"rank": 4, "update_proj_gap": 2, "scale": 2, "plain_lr_ratio": 0.5, "rank_pattern": {"q_proj": 6}},
    }
    ours, theirs = (short_run(method, method=method, **settings) for method in ("galore", "galore_torch"))
    expected, got = train(ours).result, train(theirs).result
    start = load_file(Path(ours.model_name_or_path) / "model.safetensors")
    before, after = weights(ours), weights(theirs)
    for name in before:
        assert (before[name] - start[name]).abs().max() > 1e-3
        torch.testing.assert_close(after[name], before[name], atol=1e-4, rtol=0)
    assert got["parameters"] == expected["parameters"]
    assert got["seconds"]["refresh"] > 0
    for kind in ("basis", "moments", "plain"):  # ours have counters besides
        assert got["optimizer_state_bytes"][kind] == pytest.approx(expected["optimizer_state_bytes"][kind], rel=0.02)


def test_galore_torch_saves_checkpoints_and_refuses_to_resume_by_name(short_run: Run) -> None:
    pytest.importorskip("galore_torch")
    config = short_run(method="galore_torch", dtype="bfloat16")
    train(config)
    folder = Path(config.output_dir)
    files = times(folder)
    assert load(folder / "checkpoint-6")(IDS).logits.isfinite().all()
    for resume in ("auto", str(folder / "checkpoint-4")):
        with pytest.raises(OptionError, match=r"method 'galore_torch'.*--method galore") as error:
            train(config, resume=resume)
        assert error.value.option == "resume"
    assert files == times(folder)


def test_8_bit_states_are_counted_as_they_are(short_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(OptionError, match=r"adamw_8bit on cpu.*NVIDIA GPU.*--method adamw"):
        train(short_run(method="adamw_8bit"))
    # bitsandbytes computes on a CPU too, slowly: enough to see what the method sets up
    monkeypatch.setitem(METHODS, "adamw_8bit", dataclasses.replace(METHODS["adamw_8bit"], cuda=False))
    small, large = (train(short_run(m, method=m, save_strategy="no")).result for m in ("adamw_8bit", "adamw"))
    assert small["train_loss"] == pytest.approx(large["train_loss"], rel=1e-3)
    sizes = {name: w.numel() for name, w in weights(short_run("adamw")).items()}
    full = sum(n for name, n in sizes.items() if n < 4096 or "embed" in name)  # the Trainer keeps embeddings in 32 bits
    exact = 8 * full + 2 * (sum(sizes.values()) - full)
    assert exact < small["optimizer_state_bytes"]["plain"] < 1.05 * exact


def test_a_missing_package_is_named_with_the_command_that_brings_it(
    short_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, spec in METHODS.items():
        if spec.package:
            monkeypatch.setitem(sys.modules, spec.package, None)
            with pytest.raises(OptionError, match=rf"pip install 'galore-trainer\[{spec.extra}\]'") as error:
                train(short_run(method=name))
            assert (error.value.option, error.value.got) == ("method", name)
    assert not Path(short_run().output_dir).exists()


@pytest.mark.parametrize("method", [name for name, spec in METHODS.items() if not spec.cuda])
def test_a_sharding_launch_is_refused_unless_the_method_can(
    short_run: Run, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, method, dataclasses.replace(METHODS[method], package=None))
    config = short_run(method=method)
    arguments = training_arguments(config)
    check_method(config, arguments)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if METHODS[method].sharded:
        check_method(config, arguments)
    else:
        with pytest.raises(OptionError, match="--launch-config ddp"):
            check_method(config, arguments)


@pytest.mark.parametrize(
    ("settings", "option", "words"),
    [
        ({"method": "lora", "lora": {"target_modules": ["nope"]}}, "lora.target_modules", "peft says"),
        ({"method": "dora", "lora": {"target_modules": ["lm_head"]}}, "lora.target_modules", "one weight"),
        ({"method": "galore_torch", "galore": {"rank": 4000}}, "galore.rank", "at most 64"),
        ({"method": "galore_torch", "galore": {"target_modules": ["nope"]}}, "galore.target_modules", "q_proj"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(
    short_run: Run, settings: dict, option: str, words: str
) -> None:
    pytest.importorskip(str(METHODS[settings["method"]].package))
    with pytest.raises(OptionError, match=words) as error:
        train(short_run(**settings))
    assert error.value.option == option
    assert not Path(short_run().output_dir).exists()


def test_galore_torch_refuses_what_its_package_does_not_do(short_run: Run) -> None:
    for key, value in (("stochastic_rounding", True), ("head_sharing", "shared"), ("diagnose_refreshes", 2)):
        with pytest.raises(OptionError, match=f"galore.{key}.*galore_torch"):
            short_run(method="galore_torch", galore={key: value})


@pytest.mark.parametrize("method", METHODS)
def test_plan_and_card_say_what_the_method_does(short_run: Run, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, method, dataclasses.replace(METHODS[method], cuda=False, package=None))
    config = short_run(method=method)
    plan = {line[:14].strip(): line[14:] for line in describe_plan(config).splitlines()}
    assert plan["method"].startswith(method)
    block = METHODS[method].block
    scale = METHODS[method].suggested.get("galore.scale")
    projected = f"projected weights 0.001 x {'sqrt(n / rank)' if scale is None else f'{scale:g}'}"
    rates = {"galore": projected, "lora": "adapters alone", None: "0.001, all weights"}
    assert rates[block] in plan["learning rate"]
    facts = {"versions": {"python": "3.11.7"}, "device": "some processor"}
    card = model_card(config, before=None, after=None, environment=facts)
    assert METHODS[method].title in card
    for name in ("galore", "lora"):
        assert (f"`{name}.rank`" in card) == (name == block)
    assert ("- galore\n" in card) == (block == "galore")
