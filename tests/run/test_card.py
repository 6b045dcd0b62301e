"""The model card: every line of it, and a header that the hub reads."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCard

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

## Versions

python 3.11.7, torch 2.13.0; trained on some "processor"; commit `abc123`.

## Licence

That of the base model; the data has terms of its own.
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
    text = model_card(config, before=pair[0], after=pair[1], environment=facts)
    begin, header, body = text.split("---\n", 2)
    assert (begin, yaml.safe_load(header)) == ("", HEADER)
    assert body == BEFORE_RESULT + result + AFTER_RESULT
    assert ModelCard(text).data.to_dict() == HEADER
