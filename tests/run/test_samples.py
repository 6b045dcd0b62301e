"""``eval.samples``: what is written and when, and that training does not notice."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import rich.style  # noqa: F401 - its import draws a random number, which the first of two runs would do alone
import torch
from safetensors.torch import load_file

from galore_trainer.errors import OptionError
from galore_trainer.run.launching.launch import plan_launch
from galore_trainer.run.launching.preflight import check_all
from galore_trainer.run.report.write import report
from galore_trainer.run.settings.arguments import check_samples
from galore_trainer.run.training import samples as module
from galore_trainer.run.training.train import train

EVAL = {"max_new_tokens": 4, "before": False}


def rows(config: Any) -> list[dict[str, Any]]:
    lines = (Path(config.output_dir) / "log.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "samples" in row]


def weights(config: Any, folder: str = "model") -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / folder / "model.safetensors")


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, in nested containers, too."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, numpy.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.usefixtures("short_end")
@pytest.mark.parametrize(
    "more",
    [
        {"gradient_checkpointing": True, "attention_dropout": 0.1},
        {"galore": {"rank": 4, "update_proj_gap": 2, "layerwise": True}, "gradient_accumulation_steps": 2},
        {"method": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
    ],
    ids=["checkpointing", "layer-wise", "lora"],
)
def test_training_is_the_same_with_and_without_samples(more: dict[str, Any], short_run: Any, monkeypatch: Any) -> None:
    dropout = more.pop("attention_dropout", 0.0)
    from galore_trainer.run.models import model as models

    load = models.load_model

    def with_dropout(*args: Any, **kwargs: Any) -> Any:
        model, tokenizer = load(*args, **kwargs)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = dropout
        return model, tokenizer

    monkeypatch.setattr(models, "load_model", with_dropout)

    def spoil(model: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Generate, and use every generator of random numbers on top."""
        random.random(), numpy.random.rand(), torch.rand(1)
        return generate(model, *args, **kwargs)

    generate = module.generate
    monkeypatch.setattr(module, "generate", spoil)
    plain, sampled = (
        short_run("plain", **more),
        short_run("sampled", **more, eval={**EVAL, "samples": 2, "samples_steps": 1}),
    )
    results = [train(config).result for config in (plain, sampled)]
    assert [row["step"] for row in rows(sampled)] == [0, 1, 2, 3, 4, 5, 6]
    assert rows(plain) == []
    assert equal(weights(plain), weights(sampled))
    assert results[0]["score_after"]["eval_loss"] == results[1]["score_after"]["eval_loss"]
    for name in ("optimizer.pt", "rng_state.pth"):
        states = [torch.load(Path(c.output_dir) / "checkpoint-6" / name, weights_only=False) for c in (plain, sampled)]
        assert equal(*states), name
    if more.get("method") != "lora":
        files = [Path(c.output_dir) / "model" / "generation_config.json" for c in (plain, sampled)]
        assert files[0].read_text() == files[1].read_text()


@pytest.mark.usefixtures("short_end")
def test_a_row_holds_the_first_held_out_prompts_and_full_texts(
    short_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short_run(eval={**EVAL, "samples": 2})
    train(config)
    found = rows(config)
    assert [row["step"] for row in found] == [0, 4, 6]  # of save_steps: 4, and the last
    predictions = [
        json.loads(line) for line in (Path(config.output_dir) / "predictions.jsonl").read_text().splitlines()
    ]
    for kind in ("id", "prompt", "prediction"):  # the trained model answers as it does when it is scored
        assert [sample[kind] for sample in found[-1]["samples"]] == [line[kind] for line in predictions[:2]]
    said = capsys.readouterr().out
    assert said.count("step 4  eval/0: ") == 1
    assert said.count("  -> ") == 6


@pytest.mark.usefixtures("short_end")
@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}, [0, 2, 4, 6]),
        ({"eval_strategy": "epoch", "save_strategy": "no", "per_device_train_batch_size": 16}, [0, 3, 6]),
        ({"save_strategy": "no"}, [0, 6]),
        ({"save_strategy": "no", "trainer": "trl", "eval_samples_steps": 3}, [0, 3, 6]),
    ],
    ids=["evaluations", "epochs", "neither", "trl"],
)
def test_samples_come_with_the_evaluations(more: dict[str, Any], steps: list[int], short_run: Any) -> None:
    if more.get("trainer") == "trl":
        pytest.importorskip("trl")
    every = more.pop("eval_samples_steps", None)
    config = short_run(**more, eval={**EVAL, "samples": 1, "samples_steps": every})
    train(config)
    assert [row["step"] for row in rows(config)] == steps


@pytest.mark.usefixtures("short_end")
def test_a_resumed_run_goes_on_with_its_samples(short_run: Any, tmp_path: Path, undrawn: None) -> None:
    settings = {"eval": {**EVAL, "samples": 1, "samples_steps": 2}, "save_steps": 3}
    whole, resumed = short_run("whole", **settings), short_run("resumed", **settings)
    train(whole)
    train(resumed)
    train(resumed, resume=str(Path(resumed.output_dir) / "checkpoint-3"))
    assert [row["step"] for row in rows(resumed)] == [0, 2, 4, 6, 4, 6]
    assert rows(resumed)[-2:] == rows(whole)[-2:]
    assert equal(weights(whole), weights(resumed))
    report([resumed.output_dir], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Samples during training" in text
    assert [text.count(f"step {step}:") for step in (0, 2, 3, 4, 6)] == [1, 1, 0, 1, 1]


def test_trackers_that_show_texts_get_them(short_run: Any, tmp_path: Path) -> None:
    texts: list[Any] = []
    writer = SimpleNamespace(add_text=lambda *args: texts.append(args))
    wandb = SimpleNamespace(Table=lambda **table: table, log=texts.append)
    trackers = [
        SimpleNamespace(tb_writer=writer),
        SimpleNamespace(tb_writer=None),
        SimpleNamespace(_wandb=wandb),
        object(),
    ]
    progress = SimpleNamespace(tell=lambda text: None)
    example = SimpleNamespace(id="eval/0", messages=({"role": "user", "content": "1 + 1?"},), target="2")
    trainer = SimpleNamespace(
        callback_handler=SimpleNamespace(callbacks=trackers), args=SimpleNamespace(device=torch.device("cpu"))
    )
    tokenizer = SimpleNamespace(chat_template="x", apply_chat_template=lambda *args, **kwargs: "Q")
    config = short_run(eval={**EVAL, "samples": 1})
    callback = module.SampleCallback(None, tokenizer, [example], config, tmp_path / "log.jsonl", progress, trainer)
    callback._report(5, [{"id": "eval/0", "prompt": "Q", "prediction": "<b>3</b>", "target": "2"}])
    assert texts[0] == ("samples/eval/0", "**prompt**\n\n    Q\n\n**prediction**\n\n    <b>3</b>", 5)
    assert texts[1]["samples"]["data"] == [[5, "eval/0", "Q", "<b>3</b>", "2"]]
    assert texts[1]["train/global_step"] == 5


# ------------------------------------------------------------------------------------------ refusals


def test_more_samples_than_held_out_examples_are_refused_before_the_run(short_run: Any) -> None:
    for samples, eval_samples in ((5, 4), (1, 0)):
        data = {"source": "embedded:arithmetic", "train_samples": 40, "eval_samples": eval_samples}
        config = short_run(data=data, eval={**EVAL, "samples": samples})
        for check in (check_all, train):
            with pytest.raises(OptionError, match=f"at most {eval_samples}") as caught:
                check(config)
            assert caught.value.option == "eval.samples"
            assert not Path(config.output_dir).exists()


def test_sharded_weights_are_refused_by_name(short_run: Any) -> None:
    config = short_run(eval={**EVAL, "samples": 1})
    with pytest.raises(OptionError, match="whole weights") as caught:
        check_samples(config, sharded=True)
    assert caught.value.option == "eval.samples"
    check_samples(short_run(), sharded=True)
    pytest.importorskip("deepspeed")
    with pytest.raises(OptionError, match="ZeRO-3"):
        plan_launch(config, num_processes=2, launch_config="zero3")


def test_an_interval_without_samples_is_refused(short_run: Any) -> None:
    with pytest.raises(OptionError, match=r"eval\.samples=2"):
        short_run(eval={"samples_steps": 5})
