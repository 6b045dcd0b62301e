"""The README.md of a trained model: what it came from, how it was trained, what it scores, and how to load it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from galore_trainer.run.model import HUB_ID, public_name
from galore_trainer.run.yaml_io import dump

if TYPE_CHECKING:
    from galore_trainer.run.config import RunConfig

METHODS = {
    "galore_plus": "GaLore+ (full-parameter training with projected gradients, one basis for all attention heads)",
    "galore": "GaLore (full-parameter training with projected gradients)",
    "adamw": "AdamW (full-parameter training)",
}
TRAINING = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "seed",
)  # fmt: skip
DATA_FILES = (".json", ".jsonl", ".csv", ".parquet")


def model_card(
    config: RunConfig,
    *,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    environment: Mapping[str, Any],
) -> str:
    """Write the model card as Markdown with the hub's YAML header.

    Folders are named without their path. The licence is not stated: it is the base model's.

    Args:
        before: what ``evaluate_examples`` returned for the base model; None if it was not scored.
        after: the same for the trained model.
        environment: what ``artifacts.environment`` returned.
    """
    base, data = public_name(config.model_name_or_path), _public_data(config.data.source)
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if "/" in base:
        header["base_model"] = base
    if data == config.data.source and HUB_ID.fullmatch(data):
        header["datasets"] = [data]
    header["tags"] = ["galore", "galore-trainer"]
    knobs = {"method": config.method, "dtype": config.dtype, "max_length": config.max_length}
    if config.method != "adamw":
        knobs |= {f"galore.{key}": value for key, value in dataclasses.asdict(config.galore).items()}
    knobs |= {key: config.training[key] for key in TRAINING if key in config.training}
    commit = environment.get("commit")
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return "\n".join([
        f"---\n{dump(header).strip()}\n---\n",
        f"# {base.rpartition('/')[2]}, fine-tuned with {METHODS[config.method].partition(' (')[0]}\n",
        f"- Base model: `{base}`",
        f"- Data: `{data}`" + (f", split `{config.data.split}`" if "datasets" in header else ""),
        f"- Method: {METHODS[config.method]}, by galore-trainer\n",
        "## Result\n",
        *_result_table(before, after),
        "## Use\n",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        'folder = "path/to/this/folder"',
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "```\n",
        "## Settings\n",
        "| setting | value |",
        "|---|---|",
        *(f"| `{key}` | `{value}` |" for key, value in knobs.items()),
        "\nWhat is not listed has the default of galore-trainer or of `transformers.TrainingArguments`.\n",
        "## Versions\n",
        f"{versions}; trained on {environment['device']}" + (f"; commit `{commit}`." if commit else "."),
        "\n## Licence\n",
        "That of the base model; the data has terms of its own.\n",
    ])  # fmt: skip


def _result_table(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[str]:
    scored = [(name, result) for name, result in (("base model", before), ("this model", after)) if result]
    if not scored:
        return ["Not evaluated.\n"]
    lines = ["| | exact match (95 % interval) | loss on the targets | examples |", "|---|---|---|---|"]
    for name, result in scored:
        match = "none"
        if result["score"] is not None:
            low, high = result["interval"]
            match = f"{result['score']:.1%} ({low:.1%} to {high:.1%})"
        lines.append(f"| {name} | {match} | {result['eval_loss']:.3f} | {result['n']} |")
    return [*lines, f"\nTask `{scored[-1][1]['task']}`, greedy decoding, extraction `{scored[-1][1]['extract']}`.\n"]


def _public_data(source: str) -> str:
    return PurePath(source).name if source.endswith(DATA_FILES) else source
