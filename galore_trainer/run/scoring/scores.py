"""Scores as people read them: the one number of a table, a line of a log, the cells of a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from galore_trainer.metrics.nlg import TEXT_METRICS

SKIPPED = "skipped"


def headline(scores: Mapping[str, Any], extract: str) -> dict[str, Any]:
    """The one number that stands for a model's scores.

    It is the exact match under ``extract`` with its 95 % interval where answers are numbers, BLEU without an interval
    where they are texts, and nothing where there are no answers.

    Returns:
        ``metric`` (its key in ``scores``), ``extract``, ``score`` and ``interval``; None what does not apply.
    """
    match = scores.get(f"exact_match_{extract}")
    if match:
        return {
            "metric": f"exact_match_{extract}",
            "extract": extract,
            "score": match["value"],
            "interval": [match["low"], match["high"]],
        }
    metric = "bleu" if "bleu" in scores else None
    return {"metric": metric, "extract": None, "score": scores.get("bleu"), "interval": None}


def metric_cells(scores: Mapping[str, Any]) -> dict[str, str]:
    """Name and value of each text metric, a skipped one as such; empty where answers are no texts."""
    if "bleu" not in scores:
        return {}
    had = [(key, name) for key, name in TEXT_METRICS.items() if key in scores]  # older results have fewer
    return {name: SKIPPED if scores[key] is None else f"{scores[key]:.4f}" for key, name in had}


def in_words(score: Mapping[str, Any]) -> str:
    """What ``evaluate_examples`` returned, in one line."""
    parts = [f"{name} {value}" for name, value in metric_cells(score).items()]
    if parts:
        parts[-1] += f" on {score['n']} prompts"
    elif score["score"] is not None:
        low, high = score["interval"]
        parts.append(f"{score['score']:.1%} exact match [{low:.1%}, {high:.1%}] on {score['n']} problems")
    others = [f"loss on {name} {other['eval_loss']:.4f}" for name, other in (score.get("also") or {}).items()]
    return ", ".join([*parts, f"eval loss {score['eval_loss']:.4f}", *others])


def as_lines(scores: Mapping[str, Any]) -> list[str]:
    """Scores as aligned lines: a proportion with its 95 % interval and count, what was skipped, else the value."""
    lines = []
    for name, value in scores.items():
        if isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
            count = f", {value['correct']} of {scores['n']}" if "correct" in value else ""
            share, low, high = (100 * value[key] for key in ("value", "low", "high"))
            lines.append((name, f"{share:.1f} % (95 % interval {low:.1f} to {high:.1f}{count})"))
        elif value is None and name in TEXT_METRICS:
            lines.append((name, SKIPPED))
        elif isinstance(value, float):
            lines.append((name, f"{value:.4f}" if name in TEXT_METRICS else f"{value:.4g}"))
        elif isinstance(value, str | int):
            lines.append((name, str(value)))
        elif name == "notes":
            lines += [("note", note) for note in value]
        elif name == "also":
            lines += [(f"loss on {other}", f"{figures['eval_loss']:.4g}") for other, figures in value.items()]
    return [f"{name:<26}{text}" for name, text in lines]
