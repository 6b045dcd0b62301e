"""Files are whole or absent, the plot shows the losses, the environment and the model card hold facts and no paths."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from galore_trainer.run.files import write_file, write_json
from galore_trainer.run.results import artifacts
from galore_trainer.run.results.artifacts import environment, plot_losses
from galore_trainer.run.results.card import model_card
from galore_trainer.run.scoring.scores import in_words
from galore_trainer.run.settings.run_config import DataConfig, RunConfig


def test_json_is_standard_and_numbers_it_lacks_are_null(tmp_path: Path):
    path = tmp_path / "new" / "result.json"
    write_json(path, {"loss": float("nan"), "rows": [1, (2.5, float("inf"))], "name": "größe", 3: None})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"loss": None, "rows": [1, [2.5, None]], "name": "größe", "3": None}
    assert "größe" in text
    assert text.endswith("}\n")


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["result.json"]


def test_what_cannot_be_json_does_not_touch_the_file(tmp_path: Path):
    write_file(tmp_path / "a.json", "old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert (tmp_path / "a.json").read_text() == "old"


def history(steps: int = 40) -> list[dict]:
    rows: list[dict] = [{"step": step, "loss": 2.0 / step, "learning_rate": 1e-4} for step in range(1, steps + 1)]
    return [
        *rows,
        {"step": 20, "eval_loss": 0.4},
        {"step": steps, "eval_loss": 0.2},
        {"step": steps, "train_runtime": 9},
    ]


@pytest.mark.parametrize("rows", [history(), history(1), [], [{"step": 1, "loss": float("nan")}]])
def test_plot_is_an_image_whatever_the_history(rows, tmp_path: Path):
    plot_losses(tmp_path / "deep" / "loss.png", rows, refresh_steps=[1, 21])
    assert (tmp_path / "deep" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_plot_shows_every_loss_and_every_refresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: drawn.append(figure))
    plot_losses(tmp_path / "loss.png", history(), refresh_steps=[1, 21])
    axes = drawn[0].axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["training loss"].get_ydata()) == [2.0 / s for s in range(1, 41)]
    assert list(lines["evaluation loss"].get_xydata()[1]) == [40, 0.2]
    assert lines["training loss, smoothed"].get_ydata()[0] == 2.0
    assert sum(list(line.get_xdata()) in ([1, 1], [21, 21]) for line in axes.get_lines()) == 2
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["refresh of the projection", "training loss", "training loss, smoothed", "evaluation loss"]


def test_environment_names_versions_and_hardware_and_no_place():
    facts = environment()
    assert facts["versions"]["torch"] == importlib.metadata.version("torch")
    assert facts["versions"]["galore-trainer"] == importlib.metadata.version("galore-trainer")
    assert facts["cores"] >= 1
    text = json.dumps(facts)
    for private in (os.getcwd(), str(Path.home())):
        assert private not in text


def test_commit_is_of_the_packages_own_repository_only(tmp_path: Path):
    def git(*command: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        result = subprocess.run(["git", "-C", str(tmp_path), *identity, *command], capture_output=True, text=True)
        return result.stdout.strip()

    nothing = {"commit": None, "uncommitted_changes": None}
    assert artifacts._checkout(tmp_path) == nothing
    git("init")
    assert artifacts._checkout(tmp_path) == nothing
    git("commit", "--allow-empty", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert artifacts._checkout(tmp_path) == {"commit": head, "uncommitted_changes": False}
    (tmp_path / "inner").mkdir()
    assert artifacts._checkout(tmp_path / "inner") == nothing
    (tmp_path / "inner" / "file").write_text("x")
    assert artifacts._checkout(tmp_path) == {"commit": head, "uncommitted_changes": True}


FACTS = {"versions": {"python": "3.11.7", "torch": "2.13.0"}, "device": "some processor", "commit": "abc123"}
BEFORE = {
    "task": "arithmetic",
    "extract": "flexible",
    "n": 100,
    "score": 0.09,
    "interval": [0.05, 0.16],
    "eval_loss": 2.3456,
}
AFTER = {**BEFORE, "score": 0.75, "interval": [0.66, 0.82], "eval_loss": 0.1}


def card(**changes) -> tuple[dict, str]:
    run = RunConfig(training={"learning_rate": 1e-4, "seed": 3, "run_name": "private"}, output_dir="/home/me/run")
    text = model_card(dataclasses.replace(run, **changes), before=BEFORE, after=AFTER, environment=FACTS)
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_card_states_base_data_knobs_and_scores():
    header, body = card()
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert header["library_name"] == "transformers"
    assert "license" not in header
    assert "datasets" not in header
    assert "# SmolLM2-135M-Instruct, fine-tuned with GaLore+" in body
    assert "| base model | 9.0% (5.0% to 16.0%) | 2.346 | 100 |" in body
    assert "| this model | 75.0% (66.0% to 82.0%) | 0.100 | 100 |" in body
    for row in ("| `galore.rank` | `32` |", "| `learning_rate` | `0.0001` |", "| `seed` | `3` |", "torch 2.13.0"):
        assert row in body
    assert "private" not in body


def test_card_of_local_model_and_file_names_no_path(tiny_model_dir: Path, tmp_path: Path):
    data = DataConfig(source=str(tmp_path / "problems.jsonl"))
    header, body = card(model_name_or_path=str(tiny_model_dir), data=data, method="adamw")
    assert "base_model" not in header
    assert tiny_model_dir.name in body
    assert "`problems.jsonl`" in body
    assert str(tmp_path) not in body
    assert "/home/me" not in body
    assert "galore.rank" not in body


def test_card_links_a_hub_data_set_and_says_when_nothing_was_scored():
    run = RunConfig(data=DataConfig(source="openai/gsm8k"))
    text = model_card(run, before=None, after=None, environment={**FACTS, "commit": None})
    assert yaml.safe_load(text.split("---\n")[1])["datasets"] == ["openai/gsm8k"]
    assert "Not evaluated." in text
    unscored = model_card(run, before=None, after={**AFTER, "score": None, "interval": None}, environment=FACTS)
    assert "| this model | 0.100 | 100 |" in unscored


def test_card_links_hub_ids_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}")
    for source in ("train.jsonl", "data/train.jsonl", "embedded:restaurants"):
        header, body = card(data=DataConfig(source=source))
        assert "datasets" not in header
        assert f"`{source.removeprefix('data/')}`" in body
    header, _ = card(data=DataConfig(source="data/train.jsonl", eval_source="openai/gsm8k", eval_split="test"))
    assert header["datasets"] == ["openai/gsm8k"]


def test_card_of_texts_shows_every_metric_and_what_was_skipped():
    scores = {"bleu": 0.6512, "nist": 7.25, "meteor": None, "rouge_l": 0.7, "cider": 2.125}
    texts = {
        **AFTER,
        **scores,
        "task": "nlg",
        "score": 0.6512,
        "interval": None,
        "extract": None,
        "notes": ["METEOR is skipped: it needs Java."],
    }
    before = {**texts, "bleu": 0.01}
    text = model_card(RunConfig(), before=before, after=texts, environment=FACTS)
    assert "| | BLEU | NIST | METEOR | ROUGE-L | CIDEr | loss on the targets | examples |\n|---|---|---|" in text
    assert "| base model | 0.0100 | 7.2500 | skipped | 0.7000 | 2.1250 | 0.100 | 100 |" in text
    assert "| this model | 0.6512 | 7.2500 | skipped | 0.7000 | 2.1250 | 0.100 | 100 |" in text
    assert "Task `nlg`, greedy decoding.\n\nMETEOR is skipped: it needs Java.\n" in text
    assert in_words(texts) == (
        "BLEU 0.6512, NIST 7.2500, METEOR skipped, ROUGE-L 0.7000, CIDEr 2.1250 on 100 prompts, eval loss 0.1000"
    )
    assert in_words(BEFORE) == "9.0% exact match [5.0%, 16.0%] on 100 problems, eval loss 2.3456"
