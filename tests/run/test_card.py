"""The model card: every line of it, and a header that the hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from galore_trainer.recipes.base import DataConfig
from galore_trainer.run.results.card import model_card
from galore_trainer.run.settings.run_config import RunConfig

HEADER = {
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "datasets": ["openai/gsm8k"],
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["adamw", "galore-trainer"],
}
SCORED = {
    "model-index": [
        {
            "name": "SmolLM2-135M-Instruct, fine-tuned with AdamW",
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"name": "openai/gsm8k", "type": "openai/gsm8k"},
                    "metrics": [
                        {"type": "loss", "value": 0.1, "name": "loss on the targets", "args": {"examples": 100}}
                    ],
                }
            ],
        }
    ]
}
BEFORE_RESULT = """
# SmolLM2-135M-Instruct, fine-tuned with AdamW

- Base model: `HuggingFaceTB/SmolLM2-135M-Instruct`
- Data: `openai/gsm8k`, split `train`
- Method: AdamW (full-parameter training), by galore-trainer

## Result

"""
RESULT = """\
| | exact match (95 % interval) | loss on the targets | examples |
|---|---|---|---|
| base model | 9.0% (5.0% to 16.0%) | 2.346 | 100 |
| this model | none | 0.100 | 100 |

Task `a & <b>`, greedy decoding, extraction `flexible`.

Two problems {{ were }} left out.

One more.

"""
AFTER_RESULT = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

## Settings

| setting | value |
|---|---|
| `method` | `adamw` |
| `trainer` | `hf` |
| `dtype` | `float32` |
| `max_length` | `512` |
| `learning_rate` | `1e-05` |
| `seed` | `3` |

What is not listed has the default of galore-trainer or of `transformers.TrainingArguments`.

## Train it again

`config.yaml`, where `path/to/` stands for places of your own:

```yaml
model_name_or_path: embedded:smollm2-135m
method: adamw
seed: 3
learning_rate: 1.0e-05
data:
  source: openai/gsm8k
```

```bash
galore-ft train config.yaml --num-processes 2
```

## Versions

python 3.11.7, torch 2.13.0; trained on some "processor"; commit `abc123`.

## Licence

That of the base model; the data has terms of its own. The header states none: add `license:` to it.
"""


@pytest.mark.parametrize(("scored", "result"), [(True, RESULT), (False, "Not evaluated.\n\n")])
def test_every_line_of_a_card(scored: bool, result: str) -> None:
    config = RunConfig(
        method="adamw", data=DataConfig(source="openai/gsm8k"), training={"seed": 3, "learning_rate": 1e-5}
    )
    facts = {
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "device": 'some "processor"',
        "commit": "abc123",
    }
    before = {
        "task": "a & <b>",
        "extract": "flexible",
        "n": 100,
        "score": 0.09,
        "interval": [0.05, 0.16],
        "eval_loss": 2.3456,
    }
    notes = ["Two problems {{ were }} left out.", "One more."]
    after = {**before, "score": None, "interval": None, "eval_loss": 0.1, "notes": notes}
    pair = (before, after) if scored else (None, None)
    launch = ["--num-processes", "2"]
    text = model_card(config, before=pair[0], after=pair[1], environment=facts, launch=launch)
    begin, header, body = text.split("---\n", 2)
    expected = {**HEADER, **(SCORED if scored else {})}
    assert (begin, yaml.safe_load(header)) == ("", expected)
    assert body == BEFORE_RESULT + result + AFTER_RESULT
    assert ModelCard(text).data.to_dict() == expected


def scores(**more: Any) -> dict[str, Any]:
    return {"task": "gsm8k", "extract": "flexible", "n": 100, "score": 0.75, "eval_loss": 0.25, **more}


FACTS = {"versions": {"python": "3.11.7"}, "device": "a processor"}


def test_the_index_of_a_card_is_one_that_the_hub_s_library_reads_back() -> None:
    config = RunConfig(data=DataConfig(source="openai/gsm8k", subset="main", eval_split="test"))
    card = ModelCard(model_card(config, before=None, after=scores(interval=[0.6, 0.8]), environment=FACTS))
    match, loss = card.data.eval_results
    assert (match.metric_type, match.metric_value, match.metric_name) == ("exact_match", 0.75, "exact match, flexible")
    assert match.metric_args == {"examples": 100, "interval_95_percent": [0.6, 0.8]}
    assert (loss.metric_type, loss.metric_value) == ("loss", 0.25)
    places = {(r.dataset_type, r.dataset_config, r.dataset_split) for r in (match, loss)}
    assert places == {("openai/gsm8k", "main", "test")}
    assert ModelCardData(**yaml.safe_load(card.data.to_yaml())).to_dict() == card.data.to_dict()


def test_the_index_of_texts_leaves_out_what_was_skipped() -> None:
    texts = {"bleu": 0.65, "nist": 7.25, "meteor": None, "rouge_l": 0.7, "cider": 2.125}
    after = scores(task="nlg", interval=None, extract=None, **texts)
    text = model_card(
        RunConfig(data=DataConfig(source="embedded:restaurants")), before=None, after=after, environment=FACTS
    )
    results = {result.metric_type: result for result in ModelCard(text).data.eval_results}
    assert {kind: result.metric_value for kind, result in results.items()} == {
        "bleu": 0.65,
        "nist": 7.25,
        "rouge_l": 0.7,
        "cider": 2.125,
        "loss": 0.25,
    }
    assert results["bleu"].dataset_name == "nlg, held out"


@pytest.mark.parametrize("interval", [None, [0.6, 0.8]])
def test_a_card_without_a_score_has_no_column_for_it(interval: list[float] | None) -> None:
    after = scores(task="chat", score=0.75 if interval else None, interval=interval)
    text = model_card(RunConfig(), before=None, after=after, environment=FACTS)
    heads = [*(["exact match (95 % interval)"] if interval else []), "loss on the targets", "examples"]
    assert f"\n| | {' | '.join(heads)} |\n" in text
    assert ("Task `chat`, greedy decoding, extraction" in text, "Task `chat`.\n" in text) == (
        bool(interval),
        not interval,
    )
    assert "none |" not in text


@pytest.mark.parametrize("method", ["galore_plus", "galore", "lora", "adamw"])
def test_the_configuration_of_a_card_is_that_of_the_run_without_places(method: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    settings = {
        "model_name_or_path": str(tmp_path / "base"),
        "method": method,
        "trust_remote_code": True,
        "output_dir": str(tmp_path / "run"),
        "report_to": "none",
        "hub_model_id": "me/private",
        "learning_rate": 3e-4,
        "bf16": "auto",
        "data": {"source": str(tmp_path / "train.jsonl"), "system_prompt": "Be brief."},
        "galore": {"target_modules": [r"layers\.\d+\.self_attn\.(q|k)_proj"]} if "galore" in method else {},
        "lora": {"rank": 8} if method == "lora" else {},
    }
    config = RunConfig.from_dict(settings)
    text = model_card(config, before=None, after=None, environment=FACTS)
    assert str(tmp_path) not in text
    assert "me/private" not in text
    assert text.count("trust_remote_code=True") == 2
    body = text.split("```yaml\n")[1].split("```")[0]
    assert "path/to/base" in body
    again = RunConfig.from_dict(yaml.safe_load(body)).to_dict()
    moved = {"model_name_or_path": "path/to/base", "output_dir": "runs/settings-" + method}
    expected = config.to_dict() | moved
    expected["data"] = expected["data"] | {"source": "path/to/train.jsonl"}
    for key in ("report_to", "hub_model_id"):
        del expected[key]
    assert again == expected
    row = next((line for line in text.splitlines() if line.startswith("| `galore.target_modules`")), None)
    assert row is None or row.replace("\\|", "").count("|") == 3
    summary = {"galore_plus": "rank 32, scale auto", "galore": "no residual", "lora": "rank 8, alpha 16", "adamw": ""}
    assert summary[method] in text.split("## Result")[0]
