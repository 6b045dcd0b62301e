"""The README.md of a trained model: its base, how it was trained, its scores, how to load it and to train it again."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from galore_trainer.metrics.nlg import METRICS
from galore_trainer.recipes.sources import SUFFIXES, kind_of
from galore_trainer.run.models.model import public_name
from galore_trainer.run.scoring.scores import metric_cells
from galore_trainer.run.settings.methods import METHODS
from galore_trainer.run.settings.yaml_io import dump

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from galore_trainer.run.settings.run_config import RunConfig

TEMPLATE = Path(__file__).with_name("card.md.jinja")
PRIVATE = ("output_dir", "methods", "run_name", "report_to", "push_to_hub", "logging_dir")
"""Settings that say where things go, not what is trained."""
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
    launch: Sequence[str] = (),
    overruled: str = "",
) -> str:
    """Write the model card as Markdown with the hub's YAML header.

    Folders are named without their path. The header states no licence: it is the user's to choose, within the base
    model's.

    Args:
        config: of the run.
        before: what ``evaluate_examples`` returned for the base model; None if it was not scored.
        after: the same for the trained model.
        environment: what ``artifacts.environment`` returned.
        launch: words of the command line that started several processes.
        overruled: settings that a resumed checkpoint kept in place of those of ``config``.
    """
    from huggingface_hub import ModelCard, ModelCardData

    method = METHODS[config.method]
    base, parts = public_name(config.model_name_or_path), config.data.parts()
    data = ", ".join(_public_source(part.config.source) for part in parts)
    named = dict.fromkeys(source for _, source in config.data.named_sources())
    hub_ids = [source for source in named if kind_of("data.source", source) == "hub"]
    alone_on_hub = len(parts) == 1 and kind_of("data.source", config.data.source) == "hub"
    title = f"{base.rpartition('/')[2]}, fine-tuned with {method.title.partition(' (')[0]}"
    results = _results(config, after) if after else []
    header = ModelCardData(
        base_model=base if "/" in base else None,
        datasets=hub_ids or None,
        eval_results=results or None,
        library_name="transformers",
        model_name=title if results else None,
        pipeline_tag="text-generation",
        tags=["galore" if method.block == "galore" else config.method, "galore-trainer"],
    )
    knobs: dict[str, Any] = {key: getattr(config, key) for key in ("method", "trainer", "dtype", "max_length")}
    if block := method.block:
        knobs |= {f"{block}.{key}": value for key, value in dataclasses.asdict(getattr(config, block)).items()}
    knobs |= {"packing": True} if config.packing else {}
    knobs |= {key: config.training[key] for key in TRAINING if key in config.training}
    knobs |= {"kept by the checkpoint that was resumed": overruled} if overruled else {}
    scored = [(name, result) for name, result in (("base model", before), ("this model", after)) if result]
    cells = [(name, _cells(result)) for name, result in scored]
    titles = dict.fromkeys(title for _, row in cells for title in row)
    heads = [title for title in titles if any(row.get(title) for _, row in cells)]
    card = ModelCard.from_template(
        header,
        template_path=str(TEMPLATE),
        title=title,
        base=base,
        data=data,
        split=config.data.split if alone_on_hub else None,
        method=method.title,
        trust=", trust_remote_code=True" if config.trust_remote_code else "",
        key_settings=_key_settings(config),
        recipe=dump(_recipe(config)).rstrip(),
        command=shlex.join(["galore-ft", "train", "config.yaml", *launch]),
        heads=heads,
        scores=[(name, [row.get(title) or "none" for title in heads]) for name, row in cells],
        last=scored[-1][1] if scored else {},
        decoded=any(result["score"] is not None or metric_cells(result) for _, result in scored),
        settings=knobs,
        versions=", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
        device=environment["device"],
        commit=environment.get("commit"),
    )
    return f"{card}\n"  # Jinja leaves out the last line end


def _key_settings(config: RunConfig) -> str:
    """The settings that matter most, in words; empty for methods without any of their own."""
    galore, lora = config.galore, config.lora
    block = METHODS[config.method].block
    if block == "lora":
        return f"rank {lora.rank}, alpha {lora.alpha}{', rank-stabilised' if lora.use_rslora else ''}"
    if block != "galore":
        return ""
    scale = galore.scale if isinstance(galore.scale, str) else f"{galore.scale:g}"
    corrects = " that corrects moments" if galore.residual_mode == "moments" else ""
    residual = {
        "none": "no residual",
        "scaled": "scaled residual",
        "sparse": f"residual of {galore.sparse_percent:g} %{corrects}",
        "both": f"scaled residual, and moments of {galore.sparse_percent:g} %",
    }[galore.resolved_residual]
    return f"rank {galore.rank}, scale {scale}, a new basis every {galore.update_proj_gap} steps, {residual}"


def _results(config: RunConfig, after: Mapping[str, Any]) -> list[EvalResult]:
    """The scores of the trained model, as the hub's index of models holds them."""
    from huggingface_hub import EvalResult

    source = config.data.eval_source or config.data.shown_source
    on_hub = (config.data.eval_source or not config.data.sources) and kind_of("data.source", source) == "hub"
    split = config.data.eval_split or (config.data.split if config.data.eval_source else None)
    common: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_type": source if on_hub else after["task"],
        "dataset_name": source if on_hub else f"{after['task']}, held out",
        "dataset_config": config.data.subset if on_hub else None,
        "dataset_split": split if on_hub else None,
        "dataset_revision": config.data.revision if on_hub else None,
    }
    examples = {"examples": after["n"]}
    scores: list[tuple[str, str, float, dict[str, Any]]] = []
    if metric_cells(after):
        scores += [(key, name, after[key], {}) for key, name in METRICS.items() if after[key] is not None]
    elif after["score"] is not None:
        interval = {"interval_95_percent": list(after["interval"])} if after["interval"] else {}
        scores.append(("exact_match", f"exact match, {after['extract']}", after["score"], interval))
    scores.append(("loss", "loss on the targets", after["eval_loss"], {}))
    return [
        EvalResult(metric_type=kind, metric_name=name, metric_value=value, metric_args={**examples, **more}, **common)
        for kind, name, value, more in scores
    ]


def _recipe(config: RunConfig) -> dict[str, Any]:
    """The settings that differ from the method's defaults, nested as in YAML; files and folders without their place."""
    from galore_trainer.run.settings.run_config import RunConfig

    plain = RunConfig.from_dict({"method": config.method}).to_dict()
    asked = {key: value for key, value in config.to_dict().items() if key not in PRIVATE and not key.startswith("hub_")}
    head = {"model_name_or_path": config.model_name_or_path, "method": config.method}
    return _without_places(head | _beyond(asked, plain))


def _beyond(settings: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and isinstance(plain.get(key), Mapping):
            if inner := _beyond(value, plain[key]):
                kept[key] = inner
        elif key not in plain or value != plain[key]:
            kept[key] = value
    return kept


def _without_places(value: Any) -> Any:
    """A value in which every path is ``path/to/`` its last name."""
    if isinstance(value, Mapping):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(inner) for inner in value]
    if isinstance(value, str) and _is_place(value):
        return f"path/to/{Path(value).expanduser().absolute().name}"
    return value


def _is_place(text: str) -> bool:
    if text.startswith(("/", "~", "./", "../")) or Path(text).suffix in SUFFIXES:
        return True
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or with a character that none has
        return False


def _cells(result: Mapping[str, Any]) -> dict[str, str]:
    """The figures of one model by their titles; an empty text for an exact match that the task does not have."""
    cells = metric_cells(result)
    if not cells:
        match = ""
        if result["score"] is not None:
            low, high = result["interval"]
            match = f"{result['score']:.1%} ({low:.1%} to {high:.1%})"
        cells = {"exact match (95 % interval)": match}
    others = {f"loss on {name}": f"{other['eval_loss']:.3f}" for name, other in (result.get("also") or {}).items()}
    return {**cells, "loss on the targets": f"{result['eval_loss']:.3f}", "examples": str(result["n"]), **others}


def _public_source(source: str) -> str:
    """A file without its path, anything else as it is."""
    return PurePath(source).name if kind_of("data.source", source) == "file" else source
