"""The loss of every held-out example, and scoring by the loss alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from galore_trainer.recipes import load_data
from galore_trainer.run.models.prompts import encode
from galore_trainer.run.settings.run_config import RunConfig
from galore_trainer.run.training.train import train


def test_a_run_without_generation_has_the_loss_of_each_example_and_no_score(
    short_run: Callable[..., RunConfig],
) -> None:
    config = short_run(method="adamw", eval={"generate": False, "before": True}, max_length=150)
    result = train(config).result
    folder, data = Path(config.output_dir), load_data(config.data)
    assert not list(folder.glob("predictions*"))
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    for when, weights in (("_before", config.model_name_or_path), ("", folder / "model")):
        score = result[f"score{when or '_after'}"]
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
        expected = []
        for example in data.eval:
            row = encode(tokenizer, example, config.max_length)
            ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
            with torch.no_grad():
                loss = float(model(input_ids=ids, labels=labels).loss)
            line = {"id": example.id, "loss": pytest.approx(loss, rel=1e-5), "tokens": int((labels >= 0).sum())}
            expected += [] if row["truncated"] else [line]
        lines = [json.loads(line) for line in (folder / f"losses{when}.jsonl").read_text().splitlines()]
        assert lines == expected
        assert len(lines) == score["n"] - score["eval_loss_dropped"]
        tokens = sum(line["tokens"] for line in lines)
        assert score["eval_loss"] == pytest.approx(sum(line["loss"] * line["tokens"] for line in lines) / tokens)
        assert (score["n"], score["score"], score["metric"]) == (4, None, None)
