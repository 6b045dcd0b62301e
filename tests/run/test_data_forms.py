"""Whole runs on raw texts, on chats of several turns and on several sources, and their preview."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galore_trainer.run.launching.plan import describe_plan
from galore_trainer.run.models.preview import preview
from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training.train import train

Run = Callable[..., RunConfig]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(i: int) -> dict[str, Any]:
    contents = (f"Count {i}.", f"One, {i}.", "Go on.", f"Two, {i}.")
    roles = ("human", "gpt") * 2
    return {"conversations": [{"from": role, "value": text} for role, text in zip(roles, contents, strict=True)]}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    texts = [{"text": f"Text {i}. " * (1 + 9 * (i == 3))} for i in range(8)]
    return {
        "texts": write(tmp_path / "t.jsonl", texts),
        "chats": write(tmp_path / "c.jsonl", [chat(i) for i in range(8)]),
    }


@pytest.mark.parametrize("trainer", ["hf", "trl"])
@pytest.mark.parametrize("packing", [False, True])
def test_texts_chats_and_problems_train_together(
    short_run: Run, files: dict[str, str], trainer: str, packing: bool
) -> None:
    if trainer == "trl":
        pytest.importorskip("trl")
    sources = [{"source": files["texts"]}, {"source": files["chats"], "weight": 2}, {"source": "embedded:arithmetic"}]
    data = {"sources": sources, "eval_samples": 8}
    more = {"max_steps": 2, "max_length": 280, "packing": packing, "trainer": trainer, "save_strategy": "no"}
    config = short_run(**more, data=data)
    assert f"mixed from {files['texts']}, {files['chats']}, embedded:arithmetic: 8 to train on" in describe_plan(config)
    result = train(config).result
    assert (result["task"], result["train_examples"]) == ("mixed", 8)
    assert result["score_after"]["eval_loss"] > 0
    assert result["score_after"]["n"] == 2  # problems alone have answers
    output = Path(config.output_dir)
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 6  # nothing is generated for two raw texts
    card = (output / "model" / "README.md").read_text()
    assert "t.jsonl, c.jsonl, embedded:arithmetic" in card
    assert files["texts"] not in card.partition("## ")[0]


def test_raw_texts_are_evaluated_by_their_loss_alone(short_run: Run, files: dict[str, str]) -> None:
    config = short_run(
        max_steps=2, max_length=40, save_strategy="no", data={"source": files["texts"], "eval_samples": 2}
    )
    result = train(config).result
    assert (result["task"], result["score_after"]["score"]) == ("text", None)
    assert result["score_after"]["eval_loss"] > 0
    assert (Path(config.output_dir) / "predictions.jsonl").read_text() == ""


def test_the_preview_shows_every_trained_turn(short_run: Run, files: dict[str, str]) -> None:
    data = {"source": files["chats"], "eval_samples": 1}
    shown = preview(short_run(data=data), 1)
    assert [line for line in shown.splitlines() if line.startswith("> ")] == [
        "> One, 0.<|im_end|>",
        "> Two, 0.<|im_end|>",
    ]
    shown = preview(short_run(data={**data, "train_on": "last"}), 1)
    assert [line for line in shown.splitlines() if line.startswith("> ")] == ["> Two, 0.<|im_end|>"]
    shown = preview(short_run(max_length=40, data={"source": files["texts"], "eval_samples": 1}), 8)
    assert "cut into pieces: " in shown
    assert "left out: 0 of 7" in shown
