"""The loss on other data before and after training: what it is, and that training does not feel it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from galore_trainer.cli.main import main
from galore_trainer.errors import OptionError
from galore_trainer.recipes import load_also, load_data
from galore_trainer.recipes.base import Example
from galore_trainer.run.launching.plan import describe_plan
from galore_trainer.run.models.prompts import encode
from galore_trainer.run.report.write import report
from galore_trainer.run.scoring.scores import in_words
from galore_trainer.run.settings.run_config import RunConfig, load_run_config
from galore_trainer.run.training.train import train
from made_runs import tables

OTHERS = {
    "harder": {"source": "embedded:arithmetic", "difficulty": 3, "eval_samples": 3},
    "texts": {"source": "embedded:restaurants", "eval_samples": 2, "split_seed": 1},
}


@pytest.fixture
def configure(short_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """A short run of AdamW that scores by the loss alone, with these settings of ``eval``."""

    def make(name: str, **evaluation: Any) -> RunConfig:
        settings = {"generate": False, "before": True, **evaluation}
        return short_run(name, method="adamw", learning_rate=5e-3, max_steps=2, save_steps=1, eval=settings)

    return make


def plain_loss(weights: str | Path, tokenizer_of: str | Path, examples: Sequence[Example]) -> float:
    """The mean over target tokens, one example at a time."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    for example in examples:
        row = encode(tokenizer, example, 400)
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            count = int((labels[:, 1:] >= 0).sum())
            total, tokens = total + count * float(model(input_ids=ids, labels=labels).loss), tokens + count
    return total / tokens


def test_losses_are_those_of_both_models_and_training_is_unchanged(
    configure: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = configure("with", also=OTHERS)
    result, folder = train(config).result, Path(config.output_dir)
    data = load_data(config.data)
    others = load_also(OTHERS, data.train)
    for when, weights in (("before", config.model_name_or_path), ("after", folder / "model")):
        for name, other in others.items():
            scored = result[f"score_{when}"]["also"][name]
            assert scored == {
                "task": other.task,
                "n": OTHERS[name]["eval_samples"],
                "eval_loss": pytest.approx(plain_loss(weights, config.model_name_or_path, other.eval), rel=1e-5),
                "eval_loss_dropped": 0,
            }
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [example.id for example in data.eval]
    assert "loss on harder: 3 held out (arithmetic from embedded:arithmetic)" in result["data_notes"]

    without = train(configure("without")).result
    assert "also" not in without["score_after"]
    same = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert same[0] == same[1]
    assert without["score_after"]["eval_loss"] == result["score_after"]["eval_loss"]

    before, after = (result[f"score_{when}"]["also"]["harder"]["eval_loss"] for when in ("before", "after"))
    assert f"loss on harder {after:.4f}, loss on texts" in in_words(result["score_after"])
    assert f"{before:.3f}" != f"{after:.3f}"
    card = (folder / "model" / "README.md").read_text()
    assert "| loss on harder | loss on texts |" in card
    assert f"| {before:.3f} |" in card
    assert f"| {after:.3f} |" in card
    markdown = report([folder], tmp_path / "report")[1].read_text()
    for section in ("Result", "Scores and losses"):
        row = next(iter(tables(markdown)[section].values()))
        assert float(row["loss on harder"]) == pytest.approx(after, abs=1e-4)
        assert float(row["loss on harder, change by training"]) == pytest.approx(after - before, abs=1e-4)
    capsys.readouterr()
    assert main(["eval", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["also"] == result["score_after"]["also"]
    assert main(["eval", str(folder), "--limit", "1"]) == 0
    assert "loss on texts" in capsys.readouterr().out


def test_a_resumed_run_has_the_loss_of_the_untrained_model(configure: Callable[..., RunConfig]) -> None:
    train(configure("run"))
    result = train(configure("run", also=OTHERS), resume="auto").result
    before = result["score_before"]["also"]
    assert result["resumed_from_step"] == 2
    model = configure("run").model_name_or_path
    loss = plain_loss(model, model, load_also(OTHERS, [])["texts"].eval)
    assert before["texts"]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    again = train(configure("run", also=OTHERS), resume="auto").result
    assert again["score_before"] == result["score_before"]


def test_what_is_trained_on_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Say {i}.", "completion": f"{i}"}) + "\n" for i in range(20)))
    block = {"source": str(file), "eval_samples": 5}
    data = load_data(RunConfig.from_dict({"data": block}).data)
    same = load_also({"same": block}, data.train)["same"]
    assert same.eval == data.eval
    other = load_also({"other": {**block, "split_seed": 1}}, data.train)["other"]
    assert {example.id for example in other.eval} < {example.id for example in data.eval}
    assert f", without {5 - len(other.eval)} that are trained on)" in other.notes[0]
    with pytest.raises(OptionError, match="not trained on") as error:
        load_also({"other": {**block, "split_seed": 1}}, [*data.train, *data.eval])
    assert error.value.option == "eval.also.other.source"


@pytest.mark.parametrize(
    ("also", "option", "text"),
    [
        ({"a": {"sourse": "x.jsonl"}}, "eval.also.a.sourse", "'source'"),
        ({"a": {"eval_samples": 3}}, "eval.also.a", "a source"),
        ({"a": {"source": "embedded:arithmetic", "train_samples": 3}}, "eval.also.a.train_samples", "unset"),
        ({"a": {"source": "embedded:arithmetic", "eval_samples": "x"}}, "eval.also.a.eval_samples", "an integer"),
        ({"a": {"sources": [{"source": "x.jsonl", "wait": 2}]}}, "eval.also.a.sources[0].wait", "weight"),
        ({"a b": {"source": "embedded:arithmetic"}}, "eval.also", "names"),
        ({"a": 3}, "eval.also", "a mapping of text to a mapping"),
        ({"a_change": {"source": "embedded:arithmetic"}}, "eval.also", "_change"),  # the column of a's change
    ],
)
def test_a_block_that_cannot_be_read_is_refused_by_name(also: dict[str, Any], option: str, text: str) -> None:
    with pytest.raises(OptionError, match=text) as error:
        RunConfig.from_dict({"eval": {"also": also}})
    assert error.value.option == option


@pytest.mark.parametrize(
    ("block", "option"),
    [
        ({"source": "embedded:arithmetic", "eval_samples": 0}, "eval.also.a.eval_samples"),
        ({"source": "missing.jsonl"}, "eval.also.a.source"),
        ({"source": "embedded:restaurants", "difficulty": 3}, "eval.also.a.difficulty"),
        ({"sources": [{"source": "missing.jsonl"}]}, "eval.also.a.sources[0].source"),
    ],
)
def test_data_that_cannot_be_scored_is_refused_before_training(block: dict[str, Any], option: str) -> None:
    config = RunConfig.from_dict({"eval": {"also": {"a": block}}, "use_cpu": True})
    with pytest.raises(OptionError) as error:
        describe_plan(config)
    assert error.value.option == option


def test_it_is_read_from_a_command_line_planned_and_refused_without_held_out_data(
    short_run: Callable[..., RunConfig],
) -> None:
    words = ["eval.also={b: {source: embedded:restaurants, eval_samples: 2}}"]
    config = load_run_config("quickstart", words)
    assert "- loss on b: 2 held out (nlg from embedded:restaurants)" in describe_plan(config)
    assert RunConfig.from_dict(config.to_dict()) == config
    with pytest.raises(OptionError, match=r"eval\.also"):
        load_run_config("quickstart", [*words, "data.eval_samples=0"])


def test_examples_that_do_not_fit_are_refused_before_training(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {i}.", "completion": "long " * 200} for i in range(3)]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(OptionError, match=r"shortest example of eval\.also\.long") as error:
        train(configure("run", also={"long": {"source": str(file), "eval_samples": 2}}))
    assert error.value.option == "max_length"
    assert not (tmp_path / "run").exists()


def test_examples_within_the_limit_are_the_ones_that_have_to_fit(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    train_file, file = tmp_path / "short.jsonl", tmp_path / "mixed.jsonl"
    for path, long, word in ((train_file, -1, "Tell"), (file, 0, "Say")):
        rows = [{"prompt": f"{word} {i}.", "completion": "long " * 200 if i == long else f"{i}"} for i in range(3)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = {"source": str(train_file), "eval_source": str(file), "eval_samples": None}
    config = configure("run", before=False, limit=1, also={"mixed": block})
    with pytest.raises(OptionError, match=r"shortest example of eval\.also\.mixed"):
        train(config)
    data = RunConfig.from_dict({"data": block}).data
    with pytest.raises(OptionError, match="shortest example of the held-out data"):
        train(dataclasses.replace(config, data=data, eval=dataclasses.replace(config.eval, also={})))
    assert not (tmp_path / "run" / "log.jsonl").exists()
