"""Scoring answers that are numbers: find the number in a text, compare it with the gold one, say how sure the score is.

``strict`` and ``flexible`` are the two extractions of lm-evaluation-harness's ``gsm8k`` (first number after ``####``;
last number of the text), ``last_number`` is that of LLM-Adapters. The harness compares strings; here numbers are
compared, so that ``18.0`` equals ``18``, and an ellipsis is no number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
LAST_NUMBER = re.compile(r"-?\d+\.?\d*")
NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def extract_strict(text: str) -> str | None:
    """The number after the first ``#### ``, as written; None where there is none."""
    match = STRICT.search(text)
    return match.group(1) if match else None


def extract_flexible(text: str) -> str | None:
    """The last number of the text, as written (``$1,200.``); None where there is none."""
    matches = [m for m in FLEXIBLE.findall(text) if any(c.isdigit() for c in m)]
    return matches[-1] if matches else None


def extract_last_number(text: str) -> str | None:
    """The last number of the text after commas are removed, as LLM-Adapters does; None where there is none."""
    matches = LAST_NUMBER.findall(text.replace(",", ""))
    return matches[-1] if matches else None


EXTRACTIONS: dict[str, Callable[[str], str | None]] = {
    "flexible": extract_flexible,
    "strict": extract_strict,
    "last_number": extract_last_number,
}


def to_number(text: str | None) -> float | None:
    """The number a text spells, without ``$ , %`` and a closing full stop; None where it spells none."""
    if text is None:
        return None
    try:
        value = float(re.sub(r"[$,%\s]", "", text).rstrip("."))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def same_number(predicted: str | None, gold: str | None, tolerance: float = 1e-6) -> bool:
    """Whether both texts spell the same number, up to a difference of ``tolerance`` relative to the gold one."""
    left, right = to_number(predicted), to_number(gold)
    return left is not None and right is not None and abs(left - right) <= max(tolerance * abs(right), 1e-9)


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of ``correct`` in ``n`` (E. B. Wilson, JASA 22, 1927); (0, 1) for ``n = 0``."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = correct / n, NORMAL_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # the share itself is inside


def exact_match(predictions: Sequence[str], golds: Sequence[str], tolerance: float = 1e-6) -> dict[str, Any]:
    """Score texts against gold numbers under every extraction.

    Args:
        predictions: what the model wrote, one text an example.
        golds: the gold numbers as text, in the same order.
        tolerance: largest difference relative to the gold number that still counts as equal.

    Returns:
        ``n``; per extraction ``exact_match_<name>`` with ``value`` and its 95 % interval ``low``, ``high`` (shares from
        0 to 1) and the count ``correct``; ``per_example`` with ``<name>`` (the number found) and ``<name>_correct``.
    """
    assert len(predictions) == len(golds), f"{len(predictions)} predictions for {len(golds)} examples"
    per_example: list[dict[str, Any]] = []
    for prediction, gold in zip(predictions, golds, strict=True):
        found = {name: extract(prediction) for name, extract in EXTRACTIONS.items()}
        per_example.append(
            {**found, **{f"{name}_correct": same_number(text, gold, tolerance) for name, text in found.items()}}
        )
    result: dict[str, Any] = {"n": len(golds)}
    for name in EXTRACTIONS:
        correct = sum(row[f"{name}_correct"] for row in per_example)
        low, high = wilson_interval(correct, len(golds))
        value = correct / len(golds) if golds else 0.0
        result[f"exact_match_{name}"] = {"value": value, "low": low, "high": high, "correct": correct}
    result["per_example"] = per_example
    return result
