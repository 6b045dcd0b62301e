"""The README.md of a trained model: its base, how it was trained, its scores, and how to load it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from galore_trainer.recipes.sources import kind_of
from galore_trainer.run.models.model import public_name
from galore_trainer.run.scoring.scores import metric_cells
from galore_trainer.run.settings.methods import METHODS

if TYPE_CHECKING:
    from galore_trainer.run.settings.run_config import RunConfig

TEMPLATE = Path(__file__).with_name("card.md.jinja")
TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
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
    from huggingface_hub import ModelCard, ModelCardData

    method = METHODS[config.method]
    base, parts = public_name(config.model_name_or_path), config.data.parts()
    data = ", ".join(_public_source(part.config.source) for part in parts)
    named = dict.fromkeys(source for _, source in config.data.named_sources())
    hub_ids = [source for source in named if kind_of("data.source", source) == "hub"]
    header = ModelCardData(
        base_model=base if "/" in base else None,
        datasets=hub_ids or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["galore" if method.block == "galore" else config.method, "galore-trainer"],
    )
    knobs: dict[str, Any] = {key: getattr(config, key) for key in ("method", "trainer", "dtype", "max_length")}
    if block := method.block:
        knobs |= {f"{block}.{key}": value for key, value in dataclasses.asdict(getattr(config, block)).items()}
    knobs |= {"packing": True} if config.packing else {}
    knobs |= {key: config.training[key] for key in TRAINING if key in config.training}
    scored = [(name, result) for name, result in (("base model", before), ("this model", after)) if result]
    cells = [(name, _cells(result)) for name, result in scored]
    card = ModelCard.from_template(
        header,
        template_path=str(TEMPLATE),
        base=base,
        data=data,
        split=config.data.split if len(parts) == 1 and kind_of("data.source", config.data.source) == "hub" else None,
        method=method.title,
        heads=list(cells[0][1]) if cells else [],
        scores=[(name, row.values()) for name, row in cells],
        last=scored[-1][1] if scored else {},
        settings=knobs,
        versions=", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
        device=environment["device"],
        commit=environment.get("commit"),
    )
    return f"{card}\n"  # Jinja leaves out the last line end


def _cells(result: Mapping[str, Any]) -> dict[str, str]:
    cells = metric_cells(result)
    if not cells:
        match = "none"
        if result["score"] is not None:
            low, high = result["interval"]
            match = f"{result['score']:.1%} ({low:.1%} to {high:.1%})"
        cells = {"exact match (95 % interval)": match}
    return {**cells, "loss on the targets": f"{result['eval_loss']:.3f}", "examples": str(result["n"])}


def _public_source(source: str) -> str:
    """A file without its path, anything else as it is."""
    return PurePath(source).name if kind_of("data.source", source) == "file" else source
