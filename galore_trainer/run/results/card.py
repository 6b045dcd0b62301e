"""The README.md of a trained model: its base, how it was trained, its scores, and how to load it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from galore_trainer.recipes.sources import kind_of
from galore_trainer.run.models.model import public_name
from galore_trainer.run.scoring.scores import metric_cells
from galore_trainer.run.settings.methods import METHODS
from galore_trainer.run.settings.yaml_io import dump

if TYPE_CHECKING:
    from galore_trainer.run.settings.run_config import RunConfig

TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "packing",
    "bf16",
    "seed",
)


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
    method = METHODS[config.method]
    base, data = public_name(config.model_name_or_path), config.data.source
    kind = kind_of("data.source", data)
    data = PurePath(data).name if kind == "file" else data
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if "/" in base:
        header["base_model"] = base
    if hub_ids := [source for source in _sources(config) if kind_of("data.source", source) == "hub"]:
        header["datasets"] = hub_ids
    header["tags"] = ["galore" if method.block == "galore" else config.method, "galore-trainer"]
    knobs: dict[str, Any] = {key: getattr(config, key) for key in ("method", "trainer", "dtype", "max_length")}
    if block := method.block:
        knobs |= {f"{block}.{key}": value for key, value in dataclasses.asdict(getattr(config, block)).items()}
    knobs |= {key: config.training[key] for key in TRAINING if key in config.training}
    commit = environment.get("commit")
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return "\n".join(
        [
            f"---\n{dump(header).strip()}\n---\n",
            f"# {base.rpartition('/')[2]}, fine-tuned with {method.title.partition(' (')[0]}\n",
            f"- Base model: `{base}`",
            f"- Data: `{data}`" + (f", split `{config.data.split}`" if kind == "hub" else ""),
            f"- Method: {method.title}, by galore-trainer\n",
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
        ]
    )


def _result_table(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[str]:
    scored = [(name, result) for name, result in (("base model", before), ("this model", after)) if result]
    if not scored:
        return ["Not evaluated.\n"]
    rows = [(name, _cells(result)) for name, result in scored]
    heads, last = rows[0][1], scored[-1][1]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells.values())} |" for name, cells in rows]
    extraction = f", extraction `{last['extract']}`" if last["extract"] else ""
    notes = [f"{note}\n" for note in last.get("notes", ())]
    return [*lines, f"\nTask `{last['task']}`, greedy decoding{extraction}.\n", *notes]


def _cells(result: Mapping[str, Any]) -> dict[str, str]:
    cells = metric_cells(result)
    if not cells:
        match = "none"
        if result["score"] is not None:
            low, high = result["interval"]
            match = f"{result['score']:.1%} ({low:.1%} to {high:.1%})"
        cells = {"exact match (95 % interval)": match}
    return {**cells, "loss on the targets": f"{result['eval_loss']:.3f}", "examples": str(result["n"])}


def _sources(config: RunConfig) -> list[str]:
    """What the model was trained on, and evaluated on if that is something else."""
    sources = (config.data.source, config.data.eval_source)
    return list(dict.fromkeys(source for source in sources if source is not None))
